"""Tiny GGUF files of every architecture and tensor type, with the truth they were made of.

    made = make_gguf(tmp_path / "m.gguf", "bitnet-b1.58", weights="i2_s", embedding="f16")

The container is written here byte by byte (``Gguf``), so that tests can also write lies.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from make_checkpoints import Made, layout, round_to, tiny_config
from reference_formats import absmean, encode, to_bf16, with_i2s_tail
from tiny_tokenizer import CHAT_TEMPLATE, SPECIALS, vocabulary

TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8, "q4_k": 12, "q6_k": 14, "bf16": 30}
TYPES |= {"tq1_0": 34, "tq2_0": 35, "i2_s": 36, "i2_s_arm": 36, "i2_s_rows4": 36}
ARCHITECTURES = ("bitnet", "bitnet-25", "bitnet-b1.58", "llama")
U8, I32, F32, BOOL, STRING, ARRAY, U32, U64 = 0, 5, 6, 7, 8, 9, 4, 10
_FORMS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B"}
_FORMS |= {10: "<Q", 11: "<q", 12: "<d"}


def string(text: str | bytes) -> bytes:
    """u64 length, then the bytes."""
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, x: Any) -> bytes:
    """A metadata value; an array is (inner kind, list)."""
    if kind == STRING:
        return string(x)
    if kind == ARRAY:
        inner, items = x
        return struct.pack("<IQ", inner, len(items)) + b"".join(value(inner, i) for i in items)
    return struct.pack(_FORMS[kind], x)


@dataclass
class Gguf:
    """What a file holds; ``bytes()`` writes it.  Tensors: (name, type, shape, data)."""

    keys: list[tuple[str, int, Any]] = field(default_factory=list)
    tensors: list[tuple[str, int, tuple[int, ...], bytes]] = field(default_factory=list)
    version: int = 3
    alignment: int = 32

    def bytes(self) -> bytes:
        """The file."""
        head = b"GGUF" + struct.pack("<IQQ", self.version, len(self.tensors), len(self.keys))
        head += b"".join(string(k) + struct.pack("<I", t) + value(t, v) for k, t, v in self.keys)
        offset, body = 0, []
        for name, kind, shape, data in self.tensors:
            head += string(name) + struct.pack("<I", len(shape))
            head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
            head += struct.pack("<IQ", kind, offset)
            padded = data + b"\0" * (-len(data) % self.alignment)
            body.append(padded)
            offset += len(padded)
        return head + b"\0" * (-len(head) % self.alignment) + b"".join(body)


def make_gguf(
    path: str | Path,
    arch: str = "bitnet-b1.58",
    *,
    weights: str = "i2_s",
    embedding: str = "f16",
    seed: int = 0,
    vocab_size: int = 320,
    layers: int = 2,
    tied: bool | None = None,
    extra_scale: bool = False,
) -> Made:
    """Write a tiny GGUF file and return its truth (scales always multiply).

    ``weights``: "i2_s", "i2_s_arm", "i2_s_rows4", "tq1_0", "tq2_0", or "f32", "f16", "bf16":
    latent matrices for the bitnet archs, -s, 0, s for llama.  ``embedding``: any of TYPES that
    is a float or a quantised embedding.  ``extra_scale`` adds <name>.scale tensors.
    """
    rng = np.random.default_rng(seed)
    llama = arch == "llama"
    family = "llama3" if llama else "bitnet"
    tied = (not llama) if tied is None else tied
    config = tiny_config(
        family, dtype="f16", vocab_size=vocab_size, layers=layers, tie_word_embeddings=tied
    )
    made = Made(Path(path), arch, config, divide=False)
    file = Gguf(keys=_metadata(arch, config))
    for canonical, name, shape, kind in layout(family, config):
        stored = gguf_name(name)
        if kind == "linear":
            _linear(made, file, canonical, stored, shape, weights, rng)
            if extra_scale:
                factor = np.float32(rng.uniform(0.5, 2))
                made.scales[canonical] = float(np.float32(made.scales[canonical]) * factor)
                file.tensors.append((f"{stored}.scale", 0, (1,), factor.tobytes()))
            continue
        if kind == "table":
            x, data = _quantised(rng.normal(0, 0.5, shape).astype(np.float32), embedding)
            made.tables[canonical] = x
            file.tensors.append((stored, TYPES[embedding], shape, data))
            continue
        x = rng.uniform(0.5, 1.5, shape).astype(np.float32)
        made.dense[canonical] = x
        file.tensors.append((stored, TYPES["f32"], shape, x.tobytes()))
    made.path.write_bytes(file.bytes())
    return made


def gguf_name(name: str) -> str:
    """Hugging Face name (a linear's without ".weight") -> GGUF name."""
    parts = {
        "model.embed_tokens": "token_embd",
        "lm_head": "output",
        "model.norm": "output_norm",
        "model.layers": "blk",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.attn_sub_norm": "attn_sub_norm",
        "mlp.ffn_sub_norm": "ffn_sub_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for old, new in parts.items():
        name = name.replace(old, new)
    return name


def permuted(codes: np.ndarray, heads: int) -> np.ndarray:
    """Rows as arch llama stores Q and K: the halves of each head interleaved."""
    n, k = codes.shape
    return codes.reshape(heads, 2, n // heads // 2, k).swapaxes(1, 2).reshape(n, k)


def _linear(
    made: Made,
    file: Gguf,
    canonical: str,
    name: str,
    shape: tuple[int, ...],
    weights: str,
    rng: np.random.Generator,
) -> None:
    latent = rng.normal(0, 0.02, shape).astype(np.float32)
    codes, scale = absmean(latent)
    heads = {"q": "num_attention_heads", "k": "num_key_value_heads"}
    part = canonical.rsplit(".", 1)[1]
    stored = codes
    if made.family == "llama" and part in heads:
        stored = permuted(codes, made.config[heads[part]])
    made.codes[canonical] = codes
    if weights in ("f32", "f16", "bf16"):
        if made.family == "llama":
            scale = round_to(np.array([scale]), weights)[0]
            latent = stored * np.float32(scale)
        else:
            latent = round_to(latent, weights)
            made.codes[canonical], scale = absmean(latent)
            made.latent[canonical] = latent
        file.tensors.append((f"{name}.weight", TYPES[weights], shape, _float(latent, weights)))
    elif weights.startswith("i2_s"):
        data = with_i2s_tail(encode(weights, stored), scale).tobytes()
        file.tensors.append((f"{name}.weight", TYPES[weights], shape, data))
    else:
        scale = np.float32(np.float16(scale))
        data = encode(weights, stored, float(scale)).tobytes()
        file.tensors.append((f"{name}.weight", TYPES[weights], shape, data))
    made.scales[canonical] = float(scale)


def _float(x: np.ndarray, dtype: str) -> bytes:
    if dtype == "bf16":
        return to_bf16(x).tobytes()
    return x.astype({"f32": np.float32, "f16": np.float16}[dtype]).tobytes()


def _quantised(x: np.ndarray, kind: str) -> tuple[np.ndarray, bytes]:
    """A table's values after storing, and its bytes; block formats through the gguf package."""
    if kind in ("f32", "f16", "bf16"):
        x = round_to(x, kind)
        return x, _float(x, kind)
    from gguf import GGMLQuantizationType, quants

    number = GGMLQuantizationType(TYPES[kind])
    if kind in ("q6_k", "q4_k"):  # the package only reads these: draw random blocks
        rng = np.random.default_rng(len(x))
        block = 210 if kind == "q6_k" else 144
        raw = rng.integers(0, 256, (x.shape[0], x.shape[1] // 256, block)).astype(np.uint8)
        halves = rng.uniform(0.001, 0.01, (*raw.shape[:2], 2)).astype(np.float16).view(np.uint8)
        if kind == "q6_k":
            raw[..., 208:] = halves[..., :2]
        else:
            raw[..., :4] = halves
        raw = raw.reshape(x.shape[0], -1)
    else:
        raw = quants.quantize(x, number)
    return quants.dequantize(raw, number), raw.tobytes()


def _metadata(arch: str, config: dict[str, Any]) -> list[tuple[str, int, Any]]:
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    tokens, merges = vocabulary(config["vocab_size"])
    tokens += [f"<|reserved_{i}|>" for i in range(len(tokens), config["vocab_size"])]
    types = [3 if t in SPECIALS else 1 for t in tokens]
    return [
        ("general.architecture", STRING, arch),
        ("general.name", STRING, "tiny"),
        (f"{arch}.vocab_size", U32, config["vocab_size"]),
        (f"{arch}.context_length", U32, config["max_position_embeddings"]),
        (f"{arch}.embedding_length", U32, hidden),
        (f"{arch}.block_count", U32, config["num_hidden_layers"]),
        (f"{arch}.feed_forward_length", U32, config["intermediate_size"]),
        (f"{arch}.rope.dimension_count", U32, hidden // heads),
        (f"{arch}.rope.freq_base", F32, config["rope_theta"]),
        (f"{arch}.attention.head_count", U32, heads),
        (f"{arch}.attention.head_count_kv", U32, config["num_key_value_heads"]),
        (f"{arch}.attention.layer_norm_rms_epsilon", F32, config["rms_norm_eps"]),
        ("tokenizer.ggml.model", STRING, "gpt2"),
        ("tokenizer.ggml.tokens", ARRAY, (STRING, tokens)),
        ("tokenizer.ggml.scores", ARRAY, (F32, [0.0] * len(tokens))),
        ("tokenizer.ggml.token_type", ARRAY, (I32, types)),
        ("tokenizer.ggml.merges", ARRAY, (STRING, [" ".join(m) for m in merges])),
        ("tokenizer.ggml.bos_token_id", U32, len(tokens) - 3),
        ("tokenizer.ggml.eos_token_id", U32, len(tokens) - 2),
        ("tokenizer.ggml.eot_token_id", U32, len(tokens) - 1),
        ("tokenizer.ggml.add_bos_token", BOOL, True),
        ("tokenizer.chat_template", STRING, CHAT_TEMPLATE),
    ]
