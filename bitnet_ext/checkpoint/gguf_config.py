"""A GGUF file's metadata to a BitNetConfig."""

from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.fields import Fields
from bitnet_ext.checkpoint.gguf import GgufFile
from bitnet_ext.checkpoint.gguf_constants import ARCHITECTURES
from bitnet_ext.config import BitNetConfig, RopeScaling
from bitnet_ext.errors import CheckpointError, InvalidShapeError, UnsupportedModelError

__all__ = ["gguf_config", "llama3_factors"]

MAX_POSITIONS = 1 << 24
STOP_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Published Llama-3 scalings; rope_freqs.weight holds only the factors that come out of them.
LLAMA3_SCALINGS = [
    RopeScaling("llama3", factor, 1.0, 4.0, original)
    for factor in (8.0, 32.0, 2.0, 4.0, 16.0, 64.0)
    for original in (8192, 4096, 2048, 16384)
]


def gguf_config(file: GgufFile) -> tuple[str, BitNetConfig]:
    """The architecture's name and the model's shape.

    Raises:
        UnsupportedModelError: another architecture, experts, or a rope that does not run here.
        CheckpointError: a key is absent or impossible.
    """
    where = str(file.path)
    arch = Fields(file.metadata, where).text("general.architecture")
    if arch not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{where}: general.architecture: found {arch[:80]!r}, wanted one of "
            + ", ".join(ARCHITECTURES)
        )
    prefix = f"{arch}."
    keys = {k.removeprefix(prefix): v for k, v in file.metadata.items() if k.startswith(prefix)}
    fields = Fields(keys, f"{where}: {arch}")
    if keys.get("expert_count") not in (None, 0):
        raise UnsupportedModelError(f"{where}: mixtures of experts do not run here")
    try:
        return arch, _config(file, fields, arch)
    except InvalidShapeError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _config(file: GgufFile, fields: Fields, arch: str) -> BitNetConfig:
    hidden = fields.size("embedding_length")
    heads = _uniform(fields, "attention.head_count", None)
    if "attention.key_length" not in fields.values and hidden % heads:
        raise fields.fail("attention.head_count", f"a divisor of embedding_length = {hidden}")
    head_dim = fields.size("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if fields.size(key, head_dim) != head_dim:
            raise UnsupportedModelError(
                f"{fields.where}.{key}: found {fields.values[key]}, wanted the head size {head_dim}"
            )
    vocabulary = file.tensors.get("token_embd.weight")
    if vocabulary is None or len(vocabulary.shape) != 2:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight': wanted a matrix")
    tokens = Fields(
        {
            k.removeprefix("tokenizer.ggml."): v
            for k, v in file.metadata.items()
            if k.startswith("tokenizer.ggml.")
        },
        f"{file.path}: tokenizer.ggml",
    )
    stops = [i for key in STOP_KEYS for i in tokens.token_ids(key)]
    theta = fields.number("rope.freq_base", 10000.0, low=1.0)
    sub_norms = arch != "llama"
    return BitNetConfig(
        vocab_size=fields.size("vocab_size", vocabulary.shape[0]),
        hidden_size=hidden,
        intermediate_size=_uniform(fields, "feed_forward_length", None),
        num_layers=fields.size("block_count"),
        num_heads=heads,
        num_kv_heads=_uniform(fields, "attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields.size("context_length", 2048, high=MAX_POSITIONS),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon", high=1.0),
        hidden_act=cast(Literal["relu2", "silu"], ARCHITECTURES[arch]),
        attn_sub_norm=sub_norms,
        ffn_sub_norm=sub_norms,
        attention_bias=_has_bias(file, "attn_q", "attn_k", "attn_v", "attn_output"),
        ffn_bias=_has_bias(file, "ffn_gate", "ffn_up", "ffn_down"),
        rope_theta=theta,
        rope_scaling=_rope_scaling(file, fields, theta, head_dim),
        tie_word_embeddings=arch == "bitnet" or "output.weight" not in file.tensors,
        bos_token_id=tokens.token_id("bos_token_id"),
        eos_token_ids=tuple(dict.fromkeys(stops)),
        pad_token_id=tokens.token_id("padding_token_id"),
        model_type="bitnet" if sub_norms else "llama",
    )


def _uniform(fields: Fields, key: str, default: int | None) -> int:
    """A size that some writers give once per layer; all must agree."""
    value: Any = fields.values.get(key)
    if isinstance(value, np.ndarray) and value.size:
        if (value != value[0]).any():
            raise UnsupportedModelError(f"{fields.where}.{key}: layers of different shape")
        return Fields({key: value[0].item()}, fields.where).size(key)
    return fields.size(key, default)


def _has_bias(file: GgufFile, *parts: str) -> bool:
    return any(f"blk.0.{part}.bias" in file.tensors for part in parts)


def _rope_scaling(
    file: GgufFile, fields: Fields, theta: float, head_dim: int
) -> RopeScaling | None:
    kind = fields.text("rope.scaling.type", "none")
    freqs = file.tensors.get("rope_freqs.weight")
    if kind not in ("none", "linear") or (freqs is not None and kind == "linear"):
        raise UnsupportedModelError(f"{fields.where}.rope.scaling.type: {kind[:80]!r} does not run")
    if kind == "linear":
        return RopeScaling("linear", fields.number("rope.scaling.factor", low=1e-3))
    if freqs is None:
        return None
    if freqs.type_name != "F32" or freqs.shape != (head_dim // 2,):
        raise CheckpointError(
            f"{file.path}: tensor 'rope_freqs.weight': found {freqs.type_name} "
            f"{list(freqs.shape)}, wanted F32 [{head_dim // 2}]"
        )
    found = file.raw(freqs.name).copy().view("<f4")
    if (found == 1).all():
        return None
    for scaling in LLAMA3_SCALINGS:
        if np.allclose(found, llama3_factors(scaling, theta, head_dim), rtol=1e-4):
            return scaling
    raise UnsupportedModelError(
        f"{file.path}: tensor 'rope_freqs.weight': its factors fit no published Llama-3 scaling; "
        "open the original checkpoint, whose config.json states it"
    )


def llama3_factors(scaling: RopeScaling, theta: float, head_dim: int) -> npt.NDArray[np.float32]:
    """What Llama 3.1's rule divides each rotary frequency by, [head_dim / 2].

    wavelength w = 2 pi theta^(2i/d); 1 where w < original/high, factor where w > original/low,
    else 1 / ((1 - t) / factor + t) with t = (original/w - low) / (high - low)
    """
    wavelength = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    original, low, high = (
        scaling.original_max_position_embeddings,
        scaling.low_freq_factor,
        scaling.high_freq_factor,
    )
    t = (original / wavelength - low) / (high - low)
    t = np.clip(t, 0, 1)
    return (1 / ((1 - t) / scaling.factor + t)).astype(np.float32)
