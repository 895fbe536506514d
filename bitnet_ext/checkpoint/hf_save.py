"""A model to a Hugging Face directory: packed ternary weights, tables and norms as they are."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.families import Slot, hf_name, slots
from bitnet_ext.checkpoint.hf import TOKENIZER_FILES
from bitnet_ext.checkpoint.hf_config import OWN_MODEL_TYPE, Family
from bitnet_ext.checkpoint.parts import Float32, Matrix, Parts, take_apart
from bitnet_ext.checkpoint.safetensors import Plan, Progress, write_safetensors
from bitnet_ext.checkpoint.source import Array, Checkpoint, FloatName
from bitnet_ext.checkpoint.values import bf16_bits
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CheckpointError

if TYPE_CHECKING:
    from bitnet_ext.model.load import Weights

__all__ = ["save_model"]

WRITTEN = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER_FILES)
DTYPE_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
OWN_KEYS = (
    *("num_layers", "num_heads", "num_kv_heads", "norm", "norm_eps", "gated_ffn", "ffn_norm"),
    *("attn_sub_norm", "ffn_sub_norm", "ffn_bias", "head_bias", "fused_qkv", "position"),
    *("linear_norm", "linear_norm_eps"),
)
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # where transformers has another name


def save_model(
    directory: Path,
    config: BitNetConfig,
    weights: Weights,
    checkpoint: Checkpoint | None,
    progress: Progress | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
) -> None:
    """Write the packed Hugging Face form of a loaded model, beside its tokenizer's files.

    Models of BitNet's shape (with ReLU^2, SiLU or GELU) and of Llama's load in stock transformers
    (BitNetForCausalLM, LlamaForCausalLM; ``linear_class`` by the weights' scale rule); any other
    shape, GPT-2's for one, is written with the model type "bitnet_ext", which this package reads.
    Scales, norms and tables are kept to the bit; so are biases, except where a packed layer of
    the multiply rule cannot hold one (transformers scales it with the product): the nearest then.

    ``directory`` is new, empty, or holds an earlier model of this form, which is replaced.  It
    appears when it is whole; after an error all is as it was.  ``progress(done, total)`` is
    called after each tensor.  ``tokenizer_files``: texts by name, where the checkpoint has a
    tokenizer without files.

    Raises:
        CheckpointError: the directory holds other files, or the model has no checkpoint form.
    """
    directory = directory.expanduser().resolve()
    _check_target(directory)
    parts = take_apart(config, weights, checkpoint)
    family = _family(config, parts)
    dtype = _dtype(parts)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staged = directory.parent / f".{directory.name}.{secrets.token_hex(4)}.part"
    staged.mkdir()
    try:
        plan = _plan(config, parts, family, dtype)
        write_safetensors(staged / "model.safetensors", plan, progress)
        _write_json(staged / "config.json", _config_json(config, parts, family, dtype))
        _write_json(staged / "generation_config.json", _generation(config, checkpoint))
        for name, source in (checkpoint.tokenizer_files() if checkpoint else {}).items():
            shutil.copyfile(source, staged / name)
        for name, text in (tokenizer_files or {}).items():
            (staged / name).write_text(text, encoding="utf-8")
        _swap(staged, directory)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _check_target(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: found a file, wanted a directory")
    other = sorted(p.name for p in directory.iterdir() if p.name not in WRITTEN or not p.is_file())
    if other:
        raise CheckpointError(
            f"{directory}: found {other[0]!r} in it, wanted a new or empty directory, or an "
            "earlier model of this form"
        )


def _swap(staged: Path, directory: Path) -> None:
    """Give ``staged`` the name ``directory``; what stood there goes only once that is done."""
    old = staged.with_name(staged.name + ".old")
    existed = directory.exists()
    if existed:
        directory.rename(old)
    try:
        staged.rename(directory)
    except BaseException:
        if existed:
            old.rename(directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


# The form.


def _family(config: BitNetConfig, parts: Parts) -> Family:
    """Whose class runs this shape: transformers' BitNet, its Llama, or this package alone."""
    common = (
        config.norm == "rms"
        and config.gated_ffn
        and config.ffn_norm
        and not config.fused_qkv
        and not config.head_bias
        and config.position == "rope"
        and all(m.shape[0] % 4 == 0 for m in parts.matrices.values())
    )
    sub_norms = (config.attn_sub_norm, config.ffn_sub_norm)
    if not common:
        return "own"
    if sub_norms == (False, False):
        return "llama"
    bitnet = sub_norms == (True, True) and config.q_size == config.hidden_size
    return "bitnet" if bitnet and not config.ffn_bias and not config.linear_norm else "own"


def _dtype(parts: Parts) -> FloatName:
    """The embedding's dtype where it holds every norm, bias and scale exactly, else float32."""
    dtype = parts.tables["embed"].dtype
    scales = np.array([m.scale for m in parts.matrices.values()], np.float32)
    values = [*parts.vectors.values(), scales]
    return dtype if all(_exactly(v, dtype) for v in values) else "f32"


def _exactly(values: Float32, dtype: FloatName) -> bool:
    if dtype == "f16":
        with np.errstate(over="ignore"):
            return bool((values.astype(np.float16).astype(np.float32) == values).all())
    if dtype == "bf16":
        return not (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF)).any()
    return True


def _as(values: Float32, dtype: FloatName) -> Array:
    if dtype == "bf16":
        return bf16_bits(values)
    return values.astype(np.float16 if dtype == "f16" else np.float32)


def _plan(config: BitNetConfig, parts: Parts, family: Family, dtype: FloatName) -> list[Plan]:
    """Every tensor of the file; matrices are unpacked one at a time, as they are written."""
    plan: list[Plan] = []
    for slot in slots(config):
        name = hf_name(family, slot.name)
        if slot.kind == "linear":
            matrix = parts.matrices[slot.name]
            stored, shape = _packed_form(slot)
            plan.append((f"{name}.weight", stored, shape, partial(_encode, matrix)))
            scale = np.array([matrix.scale], np.float32)
            plan.append((f"{name}.weight_scale", dtype.upper(), (1,), partial(_as, scale, dtype)))
        elif slot.kind == "table":
            table = parts.tables[slot.name]
            plan.append((name, table.dtype.upper(), slot.shape, partial(np.asarray, table.data)))
        else:
            vector, kept = parts.vectors[slot.name], dtype
            linear = parts.matrices.get(slot.name.removesuffix(".bias"))
            if linear is not None and family != "own" and not parts.divide:
                vector, kept = _unscaled(vector, linear.scale), "f32"
            plan.append((name, kept.upper(), slot.shape, partial(_as, vector, kept)))
    return plan


def _packed_form(slot: Slot) -> tuple[str, tuple[int, int]]:
    n, k = slot.shape
    return ("U8", (n // 4, k)) if n % 4 == 0 else ("I8", (n, k))


def _encode(matrix: Matrix) -> npt.NDArray[Any]:
    """Quarter i of the rows in bits 2i and 2i + 1, code = weight + 1; int8 where N % 4."""
    codes = matrix.codes()
    n, k = codes.shape
    if n % 4:
        return codes
    fields: Array = (codes + np.int8(1)).view(np.uint8).reshape(4, n // 4, k)
    packed: Array = fields[0] | fields[1] << 2 | fields[2] << 4 | fields[3] << 6
    return packed


def _unscaled(bias: Float32, scale: float) -> Float32:
    """The bias that gives this one again when it is multiplied by the weight scale in float32.

    Where no float does, the one whose product is nearest.
    """
    factor = np.float32(scale)
    near = (bias / factor).astype(np.float32)
    candidates = [near]
    for direction in (np.float32(np.inf), np.float32(-np.inf)):
        candidates.append(np.nextafter(near, direction))
    stack = np.stack(candidates)
    best = np.argmin(np.abs(stack * factor - bias), axis=0)
    chosen: Float32 = np.take_along_axis(stack, best[None], axis=0)[0]
    return chosen


# config.json


def _config_json(
    config: BitNetConfig, parts: Parts, family: Family, dtype: FloatName
) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "head_dim": config.head_dim,
        "hidden_act": ACTIVATIONS.get(config.hidden_act, config.hidden_act),
        "max_position_embeddings": config.max_position_embeddings,
        "attention_bias": config.attention_bias,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": _rope_json(config),
        "bos_token_id": config.bos_token_id,
        "pad_token_id": config.pad_token_id,
        "torch_dtype": DTYPE_NAMES[dtype],
    }
    if family == "own":
        return _own_json(config, parts) | shape
    stock = {
        "architectures": ["BitNetForCausalLM" if family == "bitnet" else "LlamaForCausalLM"],
        "model_type": family,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "eos_token_id": _eos(config),
        "use_cache": True,
        "quantization_config": _quantization_json(config, parts),
    }
    if family == "llama":
        stock["mlp_bias"] = config.ffn_bias
    return shape | stock


def _own_json(config: BitNetConfig, parts: Parts) -> dict[str, Any]:
    return {
        "architectures": ["BitNetExtForCausalLM"],
        "model_type": OWN_MODEL_TYPE,
        "scale_rule": "divide" if parts.divide else "multiply",
        "eos_token_ids": list(config.eos_token_ids),
        **{name: getattr(config, name) for name in OWN_KEYS},
    }


def _quantization_json(config: BitNetConfig, parts: Parts) -> dict[str, Any]:
    section: dict[str, Any] = {
        "quant_method": "bitnet",
        "linear_class": "bitlinear" if parts.divide else "autobitlinear",
        "quantization_mode": "offline",
        "modules_to_not_convert": None,
    }
    if config.linear_norm:
        section |= {"use_rms_norm": True, "rms_norm_eps": config.linear_norm_eps}
    return section


def _rope_json(config: BitNetConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _eos(config: BitNetConfig) -> int | list[int] | None:
    ids = list(config.eos_token_ids)
    return ids if len(ids) > 1 else ids[0] if ids else None


def _generation(config: BitNetConfig, checkpoint: Checkpoint | None) -> dict[str, Any]:
    """The checkpoint's own defaults, and the stop ids of all its sources."""
    found = dict(checkpoint.generation_config) if checkpoint is not None else {}
    ids = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": _eos(config),
        "pad_token_id": config.pad_token_id,
    }
    return found | {key: value for key, value in ids.items() if value is not None}
