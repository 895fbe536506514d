"""Tiny Hugging Face checkpoints of every family, deterministic, with the truth they were made of.

    made = make_hf(tmp_path / "m", "bitnet")
    made.codes["layers.0.q"], made.scales["layers.0.q"], made.dense["final_norm.weight"], made.embed

Nothing here comes from the package under test.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from published import PUBLISHED
from reference_formats import absmean, encode_hf, from_bf16, to_bf16
from tiny_tokenizer import tokenizer_config, tokenizer_json

FAMILIES = tuple(PUBLISHED)
LATENT = ("bitnet-bf16", "1bitllm")

# hidden, intermediate, heads, kv heads: small, with the ratios of the published shapes
_TINY_SHAPES = {
    "bitnet": (256, 768, 4, 1),
    "bitnet-bf16": (256, 768, 4, 1),
    "1bitllm": (256, 768, 4, 4),
    "llama3": (256, 1024, 8, 2),
    "falcon3": (384, 1152, 6, 2),
    "falcon-e": (256, 1024, 8, 1),
    "llama-rms": (256, 1024, 8, 4),
    "gpt2": (256, 1024, 4, 4),
}


@dataclass
class Made:
    """A written checkpoint and the values in it.

    ``codes`` int8 [N, K] and ``scales`` by canonical linear name ("layers.0.q"); ``divide`` says
    how the scale acts; ``latent`` holds float32 matrices of an online checkpoint; ``dense`` holds
    norms and biases, ``tables`` "embed", "head", "positions", all float32 as stored.
    """

    path: Path
    family: str
    config: dict[str, Any]
    divide: bool
    codes: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    latent: dict[str, np.ndarray] = field(default_factory=dict)
    dense: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)


def round_to(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 rounded to what ``dtype`` ("f32" | "f16" | "bf16") can hold."""
    x = np.ascontiguousarray(x, np.float32)
    if dtype == "f16":
        return x.astype(np.float16).astype(np.float32)
    return from_bf16(to_bf16(x)) if dtype == "bf16" else x


def tiny_config(family: str, *, dtype: str, vocab_size: int, layers: int, **changes: Any) -> dict:
    """The published config.json with tiny sizes; ``changes`` are laid over it, None deletes."""
    hidden, intermediate, heads, kv_heads = _TINY_SHAPES[family]
    own = family == "gpt2"
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
    config = PUBLISHED[family] | {
        "vocab_size": vocab_size,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_layers" if own else "num_hidden_layers": layers,
        "num_heads" if own else "num_attention_heads": heads,
        "num_kv_heads" if own else "num_key_value_heads": kv_heads,
        "bos_token_id": vocab_size - 3,
        "eos_token_ids" if own else "eos_token_id": [vocab_size - 2] if own else vocab_size - 2,
        "max_position_embeddings": 512,
        "dtype" if "dtype" in PUBLISHED[family] else "torch_dtype": names[dtype],
    }
    if "head_dim" in config:
        config["head_dim"] = 64 if family == "falcon3" else hidden // heads
    if config.get("pad_token_id") is not None:
        config["pad_token_id"] = vocab_size - 1
    config |= changes
    return {k: v for k, v in config.items() if v is not None or k == "rope_scaling"}


def make_hf(
    directory: str | Path,
    family: str = "bitnet",
    *,
    dtype: str | None = None,
    seed: int = 0,
    vocab_size: int = 320,
    layers: int = 2,
    shards: int = 1,
    tokenizer: bool = True,
    spread: float = 0.02,
    **changes: Any,
) -> Made:
    """Write a tiny checkpoint of ``family`` (one of FAMILIES) and return its truth.

    ``dtype`` is that of dense tensors, tables and latent weights ("f32", "f16", "bf16"; default
    bf16, f32 for 1bitllm, llama-rms and gpt2).  ``spread`` is the standard deviation of latent
    weights: at the published 0.02 so small a model is little but its embedding.  ``changes``
    overrides keys of config.json.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    dtype = dtype or ("f32" if family in ("1bitllm", "llama-rms", "gpt2") else "bf16")
    config = tiny_config(family, dtype=dtype, vocab_size=vocab_size, layers=layers, **changes)
    quantization = config.get("quantization_config", {})
    divide = family != "gpt2" and quantization.get("linear_class", "bitlinear") == "bitlinear"
    made = Made(directory, family, config, divide and family not in LATENT)
    if family == "gpt2":
        made.divide = config["scale_rule"] == "divide"
    tensors = _tensors(made, dtype, np.random.RandomState(seed), spread)  # a stream NumPy keeps
    write_tensors(directory, tensors, shards)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generation = {"bos_token_id": vocab_size - 3, "eos_token_id": [vocab_size - 2, vocab_size - 1]}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer and vocab_size >= 259:
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer_json(vocab_size)))
        (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config()))
    return made


Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name -> dtype, shape, bytes


def write_tensors(directory: Path, tensors: Tensors, shards: int = 1) -> None:
    """model.safetensors, or ``shards`` files with their index."""
    names = list(tensors)
    if shards == 1:
        _serialize(tensors, directory / "model.safetensors")
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        _serialize({n: tensors[n] for n in part}, directory / file)
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(data) for _, _, data in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _serialize(tensors: Tensors, path: Path) -> None:
    """8 bytes of header length, the JSON header padded to 8, the data in header order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        ends = [offset, offset + len(data)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": ends}
        offset = ends[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    blobs = (data for _, _, data in tensors.values())
    path.write_bytes(b"".join([len(text).to_bytes(8, "little"), text, *blobs]))


def _stored(x: np.ndarray, dtype: str) -> tuple[str, tuple[int, ...], bytes]:
    if dtype == "bf16":
        return "BF16", x.shape, to_bf16(x).tobytes()
    return dtype.upper(), x.shape, x.astype({"f32": "<f4", "f16": "<f2"}[dtype]).tobytes()


def _tensors(made: Made, dtype: str, rng: np.random.RandomState, spread: float) -> Tensors:
    """Draw every value, note it in ``made`` and return what the files hold."""
    tensors: Tensors = {}
    for canonical, name, shape, kind in layout(made.family, made.config):
        if kind == "linear":
            _linear(made, tensors, canonical, name, shape, dtype, rng, spread)
            continue
        if kind == "table":
            x = rng.normal(0, 0.5, shape)
        else:  # norm weights stand around 1, biases around 0
            x = rng.uniform(0.5, 1.5, shape) if kind == "norm" else rng.normal(0, 0.2, shape)
        x = round_to(x, dtype)
        tensors[name] = _stored(x, dtype)
        if kind == "bias" and _scaled_bias(made, canonical):
            x = x * np.float32(made.scales[canonical.removesuffix(".bias")])
        (made.tables if kind == "table" else made.dense)[canonical] = x
    return tensors


def _scaled_bias(made: Made, canonical: str) -> bool:
    """An offline autobitlinear adds its bias before the weight scale: y = (x.W + b) * scale."""
    own = made.family == "gpt2" or made.family in LATENT
    return not own and not made.divide and canonical.removesuffix(".bias") in made.scales


def _linear(
    made: Made,
    tensors: Tensors,
    canonical: str,
    name: str,
    shape: tuple[int, ...],
    dtype: str,
    rng: np.random.RandomState,
    spread: float,
) -> None:
    latent = round_to(rng.normal(0, spread, shape), dtype)
    codes, scale = absmean(latent)
    made.codes[canonical] = codes
    if made.family in LATENT:
        made.latent[canonical], made.scales[canonical] = latent, float(scale)
        tensors[f"{name}.weight"] = _stored(latent, dtype)
        return
    stored = round_to(np.array([1 / scale if made.divide else scale]), dtype)
    made.scales[canonical] = float(stored[0])
    packed = encode_hf(codes)
    tensors[f"{name}.weight"] = ("U8", packed.shape, packed.tobytes())
    tensors[f"{name}.weight_scale"] = _stored(stored, dtype)


Entry = tuple[str, str, tuple[int, ...], str]  # canonical name, name in the file, shape, kind


def layout(family: str, config: dict[str, Any]) -> list[Entry]:
    """Every tensor of a checkpoint; a "linear" entry's file name lacks ".weight"."""
    if family == "gpt2":
        return _own_layout(config)
    old = "BitnetForCausalLM" in config["architectures"]
    sub_norms = old or config["model_type"] == "bitnet"
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = (config[f"num_{n}_heads"] * head_dim for n in ("attention", "key_value"))
    entries: list[Entry] = [
        ("embed", "model.embed_tokens.weight", (config["vocab_size"], hidden), "table")
    ]
    for i in range(config["num_hidden_layers"]):
        p, own = f"model.layers.{i}", f"layers.{i}"
        entries += [
            (f"{own}.attn_norm.weight", f"{p}.input_layernorm.weight", (hidden,), "norm"),
            (f"{own}.ffn_norm.weight", f"{p}.post_attention_layernorm.weight", (hidden,), "norm"),
        ]
        linears = {
            "q": ("self_attn.q_proj", q, hidden),
            "k": ("self_attn.k_proj", kv, hidden),
            "v": ("self_attn.v_proj", kv, hidden),
            "o": ("self_attn.o_proj", hidden, q),
            "gate": ("mlp.gate_proj", inter, hidden),
            "up": ("mlp.up_proj", inter, hidden),
            "down": ("mlp.down_proj", hidden, inter),
        }
        for short, (name, n, k) in linears.items():
            entries.append((f"{own}.{short}", f"{p}.{name}", (n, k), "linear"))
            biased = config.get("attention_bias") if short in "qkvo" else config.get("mlp_bias")
            if biased:
                entries.append((f"{own}.{short}.bias", f"{p}.{name}.bias", (n,), "bias"))
            if config.get("quantization_config", {}).get("use_rms_norm"):
                norm = f"{p}.{name}.rms_norm.weight"
                entries.append((f"{own}.{short}.norm.weight", norm, (k,), "norm"))
        if sub_norms:
            attn, ffn = ("inner_attn_ln", "ffn_layernorm") if old else ("attn_sub_norm",) * 2
            ffn = ffn if old else "ffn_sub_norm"
            entries += [
                (f"{own}.attn_sub_norm.weight", f"{p}.self_attn.{attn}.weight", (q,), "norm"),
                (f"{own}.ffn_sub_norm.weight", f"{p}.mlp.{ffn}.weight", (inter,), "norm"),
            ]
    entries.append(("final_norm.weight", "model.norm.weight", (hidden,), "norm"))
    if not config["tie_word_embeddings"]:
        entries.append(("head", "lm_head.weight", (config["vocab_size"], hidden), "table"))
    return entries


def _own_layout(config: dict[str, Any]) -> list[Entry]:
    """The package's own form: canonical names, ".weight" behind tables and linears."""
    hidden, inter = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[n] * config["head_dim"] for n in ("num_heads", "num_kv_heads"))
    names: list[tuple[str, tuple[int, ...], str]] = [
        ("embed", (config["vocab_size"], hidden), "table")
    ]
    if config["position"] == "learned":
        names.append(("positions", (config["max_position_embeddings"], hidden), "table"))

    def norm(name: str, size: int) -> None:
        names.append((f"{name}.weight", (size,), "norm"))
        if config["norm"] == "layer":
            names.append((f"{name}.bias", (size,), "bias"))

    def linear(name: str, n: int, k: int, bias: bool) -> None:
        names.append((name, (n, k), "linear"))
        if bias:
            names.append((f"{name}.bias", (n,), "bias"))
        if config["linear_norm"]:
            names.append((f"{name}.norm.weight", (k,), "norm"))

    for i in range(config["num_layers"]):
        p = f"layers.{i}"
        norm(f"{p}.attn_norm", hidden)
        if config["fused_qkv"]:
            linear(f"{p}.qkv", q + 2 * kv, hidden, config["attention_bias"])
        else:
            for short, n in (("q", q), ("k", kv), ("v", kv)):
                linear(f"{p}.{short}", n, hidden, config["attention_bias"])
        if config["attn_sub_norm"]:
            norm(f"{p}.attn_sub_norm", q)
        linear(f"{p}.o", hidden, q, config["attention_bias"])
        if config["ffn_norm"]:
            norm(f"{p}.ffn_norm", hidden)
        for short in ("gate", "up") if config["gated_ffn"] else ("up",):
            linear(f"{p}.{short}", inter, hidden, config["ffn_bias"])
        if config["ffn_sub_norm"]:
            norm(f"{p}.ffn_sub_norm", inter)
        linear(f"{p}.down", hidden, inter, config["ffn_bias"])
    norm("final_norm", hidden)
    if not config["tie_word_embeddings"]:
        names.append(("head", (config["vocab_size"], hidden), "table"))
    if config["head_bias"]:
        names.append(("head.bias", (config["vocab_size"],), "bias"))
    suffix = {"table": ".weight"}
    return [(n, n + suffix.get(kind, ""), shape, kind) for n, shape, kind in names]
