"""A model to a GGUF file that llama.cpp, its forks and this package read."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.families import Slot, gguf_name, slots
from bitnet_ext.checkpoint.gguf_config import LLAMA3_SCALINGS, llama3_factors
from bitnet_ext.checkpoint.gguf_constants import NO_TOKENIZER
from bitnet_ext.checkpoint.gguf_quants import encode_i2_s, encode_tq1_0, encode_tq2_0
from bitnet_ext.checkpoint.gguf_tokenizer import tokenizer_metadata
from bitnet_ext.checkpoint.gguf_write import write_gguf
from bitnet_ext.checkpoint.parts import Matrix, Parts, take_apart
from bitnet_ext.checkpoint.safetensors import Plan, Progress
from bitnet_ext.checkpoint.source import Array, Checkpoint
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import UnsupportedModelError

if TYPE_CHECKING:
    from bitnet_ext.model.load import Weights

__all__ = ["GGUF_TYPES", "GgufType", "save_gguf"]

GgufType = Literal["tq1_0", "tq2_0", "i2_s", "f16", "f32"]
# name -> (columns must be a multiple of, general.file_type of llama.cpp and its forks)
GGUF_TYPES: dict[str, tuple[int, int]] = {
    "f32": (1, 0),
    "f16": (1, 1),
    "tq1_0": (256, 36),
    "tq2_0": (256, 37),
    "i2_s": (128, 40),
}
HALF_SCALES = ("f16", "tq1_0", "tq2_0")
STOP_NAMES = ("eos_token_id", "eot_token_id", "eom_token_id")
log = logging.getLogger("bitnet_ext")


def save_gguf(
    path: Path,
    config: BitNetConfig,
    weights: Weights,
    checkpoint: Checkpoint | None,
    kind: GgufType = "i2_s",
    progress: Progress | None = None,
) -> float:
    """Write a model as one GGUF file, with its tokenizer where the source has one.

    The architecture is "bitnet-b1.58" (sub-norms, ReLU^2), "bitnet" (sub-norms, SiLU, tied head)
    or "llama" (no sub-norms, SiLU; rows of Q and K interleaved as that format has them).  Tables
    keep their dtype; norms and biases are float32.

    The ternary codes are exact in every type.  A scale that divides is stored as 1 / scale,
    rounded to float32.  "i2_s" and "f32" hold scales in float32; "tq1_0", "tq2_0" and "f16"
    round them to float16, at most 2^-11 of their value, which is logged where it happens.
    ``progress(done, total)`` is called after each tensor.

    Returns:
        The largest relative change of a scale; 0.0 when all are exact.

    Raises:
        UnsupportedModelError: a shape, rope or tokenizer that GGUF cannot hold, columns that do
            not fill its blocks, or a scale outside float16's normal numbers.
    """
    parts = take_apart(config, weights, checkpoint)
    arch = _architecture(config)
    scales = {name: _stored_scale(m, parts.divide, kind) for name, m in parts.matrices.items()}
    change = max(
        abs(scales[name] * m.scale - 1) if parts.divide else abs(scales[name] / m.scale - 1)
        for name, m in parts.matrices.items()
    )
    metadata = _metadata(config, arch, kind) | _token_ids(config)
    # Without the key, llama.cpp opens no file.
    metadata |= {"tokenizer.ggml.model": NO_TOKENIZER}
    if checkpoint is not None:
        metadata |= tokenizer_metadata(config, checkpoint)
    write_gguf(path, metadata, _plan(config, parts, arch, kind, scales), progress)
    if change > 1e-7:
        log.warning("%s: scales were rounded by up to %.1e of their value", path, change)
    return change


def _architecture(config: BitNetConfig) -> str:
    plain = (
        config.norm == "rms"
        and config.gated_ffn
        and config.ffn_norm
        and not config.fused_qkv
        and not config.head_bias
        and not config.linear_norm
        and config.position == "rope"
    )
    sub_norms = (config.attn_sub_norm, config.ffn_sub_norm)
    if plain and sub_norms == (False, False) and config.hidden_act == "silu":
        return "llama"
    if plain and sub_norms == (True, True):
        if config.hidden_act == "relu2":
            return "bitnet-b1.58"
        if config.hidden_act == "silu" and config.tie_word_embeddings:
            return "bitnet"
    raise UnsupportedModelError(
        "GGUF has no architecture for this model: found "
        f"norm={config.norm}, hidden_act={config.hidden_act}, gated_ffn={config.gated_ffn}, "
        f"sub-norms={sub_norms}, position={config.position}, linear_norm={config.linear_norm}, "
        f"tied head={config.tie_word_embeddings}; wanted RMSNorm, RoPE and a gated FFN, with "
        "both sub-norms and ReLU^2 (or SiLU and a tied head), or with none and SiLU"
    )


def _stored_scale(matrix: Matrix, divide: bool, kind: GgufType) -> float:
    """The multiplying scale as the file will hold it."""
    multiple, _ = GGUF_TYPES[kind]
    if matrix.shape[1] % multiple:
        raise UnsupportedModelError(
            f"{matrix.name}: found {matrix.shape[1]} columns, wanted a multiple of {multiple} for "
            f"{kind.upper()}; choose another type"
        )
    scale = np.float32(1) / np.float32(matrix.scale) if divide else np.float32(matrix.scale)
    if kind in HALF_SCALES:
        with np.errstate(over="ignore"):
            half = np.float32(np.float16(scale))
        if not np.finfo(np.float16).smallest_normal <= half <= np.finfo(np.float16).max:
            raise UnsupportedModelError(
                f"{matrix.name}: found the scale {scale}, which float16 cannot hold; wanted "
                "another type than " + kind.upper() + ", I2_S for one"
            )
        return float(half)
    return float(scale)


def _plan(
    config: BitNetConfig, parts: Parts, arch: str, kind: GgufType, scales: dict[str, float]
) -> list[Plan]:
    plan: list[Plan] = []
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        factors = _rope_factors(config)
        plan.append(("rope_freqs.weight", "F32", factors.shape, partial(np.asarray, factors)))
    for slot in slots(config):
        name = gguf_name(slot.name)
        order = _row_order(config, arch, slot)
        if slot.kind == "linear":
            matrix, scale = parts.matrices[slot.name], scales[slot.name]
            make = partial(_encode, matrix, order, scale, kind)
            plan.append((f"{name}.weight", kind.upper(), slot.shape, make))
        elif slot.kind == "table":
            table = parts.tables[slot.name]
            plan.append((name, table.dtype.upper(), slot.shape, partial(np.asarray, table.data)))
        else:
            vector = parts.vectors[slot.name][order]
            plan.append((name, "F32", slot.shape, partial(np.asarray, vector)))
    return plan


def _row_order(config: BitNetConfig, arch: str, slot: Slot) -> Any:
    """Arch llama interleaves the two halves of each Q and K head: row (h, j, half) of the file
    is row (h, half, j) of the matrix."""
    part = slot.name.removesuffix(".bias").rpartition(".")[2]
    if arch != "llama" or part not in ("q", "k"):
        return slice(None)
    heads = config.num_heads if part == "q" else config.num_kv_heads
    rows = np.arange(heads * config.head_dim)
    return rows.reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)


def _encode(matrix: Matrix, order: Any, scale: float, kind: GgufType) -> Array:
    codes = np.ascontiguousarray(matrix.codes()[order])
    if kind == "i2_s":
        return encode_i2_s(codes, scale)
    if kind == "tq1_0":
        return encode_tq1_0(codes, scale)
    if kind == "tq2_0":
        return encode_tq2_0(codes, scale)
    values: Array = codes.astype(np.float32) * np.float32(scale)
    return values.astype(np.float16) if kind == "f16" else values


def _metadata(config: BitNetConfig, arch: str, kind: GgufType) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
    }
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        keys |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(scaling.factor)}
    return {
        "general.architecture": arch,
        "general.file_type": GGUF_TYPES[kind][1],
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in keys.items()},
    }


def _rope_factors(config: BitNetConfig) -> npt.NDArray[np.float32]:
    """rope_freqs.weight of a Llama-3 scaling, which a reader must recognise again."""
    scaling = config.rope_scaling
    if scaling not in LLAMA3_SCALINGS:
        raise UnsupportedModelError(
            f"rope_scaling: found {scaling}, wanted one of the published Llama-3 scalings: GGUF "
            "holds only their factors"
        )
    return llama3_factors(scaling, config.rope_theta, config.head_dim)


def _token_ids(config: BitNetConfig) -> dict[str, int]:
    ids = {"bos_token_id": config.bos_token_id, "padding_token_id": config.pad_token_id}
    ids |= dict(zip(STOP_NAMES, config.eos_token_ids, strict=False))
    if len(config.eos_token_ids) > len(STOP_NAMES):
        lost = config.eos_token_ids[len(STOP_NAMES) :]
        log.warning("GGUF has names for three stop ids; left out: %s", lost)
    return {f"tokenizer.ggml.{key}": value for key, value in ids.items() if value is not None}
