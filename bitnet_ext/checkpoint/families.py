"""Which tensors a model has, by canonical name, and what each family's files call them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from bitnet_ext.checkpoint.hf_config import Family
from bitnet_ext.config import BitNetConfig

__all__ = ["Slot", "gguf_name", "hf_name", "slots"]


@dataclass(frozen=True)
class Slot:
    """One tensor: ``shape`` is [N, K] of a linear or table, [size] of a vector."""

    name: str
    shape: tuple[int, ...]
    kind: Literal["linear", "table", "vector"]


def slots(config: BitNetConfig) -> Iterator[Slot]:
    """Every tensor of a model of this shape, embedding first, in the order of the layers.

    A generator: a lying layer count costs nothing before the first missing tensor.
    """
    hidden = config.hidden_size
    yield Slot("embed", (config.vocab_size, hidden), "table")
    if config.position == "learned":
        yield Slot("positions", (config.max_position_embeddings, hidden), "table")
    for layer in range(config.num_layers):
        yield from _layer(config, f"layers.{layer}")
    yield from _norm(config, "final_norm", hidden)
    if not config.tie_word_embeddings:
        yield Slot("head", (config.vocab_size, hidden), "table")
    if config.head_bias:
        yield Slot("head.bias", (config.vocab_size,), "vector")


def _layer(config: BitNetConfig, prefix: str) -> Iterator[Slot]:
    hidden, inter, q, kv = (
        config.hidden_size,
        config.intermediate_size,
        config.q_size,
        config.kv_size,
    )
    attention, ffn = config.attention_bias, config.ffn_bias
    yield from _norm(config, f"{prefix}.attn_norm", hidden)
    if config.fused_qkv:
        yield from _linear(config, f"{prefix}.qkv", q + 2 * kv, hidden, attention)
    else:
        for name, n in (("q", q), ("k", kv), ("v", kv)):
            yield from _linear(config, f"{prefix}.{name}", n, hidden, attention)
    if config.attn_sub_norm:
        yield from _norm(config, f"{prefix}.attn_sub_norm", q)
    yield from _linear(config, f"{prefix}.o", hidden, q, attention)
    if config.ffn_norm:
        yield from _norm(config, f"{prefix}.ffn_norm", hidden)
    for name in ("gate", "up") if config.gated_ffn else ("up",):
        yield from _linear(config, f"{prefix}.{name}", inter, hidden, ffn)
    if config.ffn_sub_norm:
        yield from _norm(config, f"{prefix}.ffn_sub_norm", inter)
    yield from _linear(config, f"{prefix}.down", hidden, inter, ffn)


def _norm(config: BitNetConfig, name: str, size: int) -> Iterator[Slot]:
    yield Slot(f"{name}.weight", (size,), "vector")
    if config.norm == "layer":
        yield Slot(f"{name}.bias", (size,), "vector")


def _linear(config: BitNetConfig, name: str, n: int, k: int, bias: bool) -> Iterator[Slot]:
    yield Slot(name, (n, k), "linear")
    if bias:
        yield Slot(f"{name}.bias", (n,), "vector")
    if config.linear_norm:
        yield Slot(f"{name}.norm.weight", (k,), "vector")


_HF_PARTS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
}
_1BITLLM_PARTS = _HF_PARTS | {
    "attn_sub_norm": "self_attn.inner_attn_ln",
    "ffn_sub_norm": "mlp.ffn_layernorm",
}
_HF_WHOLE = {
    "embed": "model.embed_tokens.weight",
    "head": "lm_head.weight",
    "final_norm.weight": "model.norm.weight",
}


def hf_name(family: Family, name: str) -> str:
    """A canonical name in a family's safetensors file.

    A linear layer gives its module name, to which ".weight" and ".weight_scale" are added.
    """
    if family == "own":
        return f"{name}.weight" if name in ("embed", "head", "positions") else name
    if name in _HF_WHOLE:
        return _HF_WHOLE[name]
    _, layer, part, *rest = name.split(".")
    parts = _1BITLLM_PARTS if family == "1bitllm" else _HF_PARTS
    if rest[:1] == ["norm"]:  # the norm inside a linear layer
        rest[0] = "rms_norm"
    return ".".join(["model.layers", layer, parts[part], *rest])


_GGUF_PARTS = {
    "attn_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
    "attn_sub_norm": "attn_sub_norm",
    "ffn_sub_norm": "ffn_sub_norm",
}
_GGUF_WHOLE = {
    "embed": "token_embd.weight",
    "head": "output.weight",
    "final_norm.weight": "output_norm.weight",
}


def gguf_name(name: str) -> str:
    """A canonical name in a GGUF file; a linear layer without its ".weight"."""
    if name in _GGUF_WHOLE:
        return _GGUF_WHOLE[name]
    _, layer, part, *rest = name.split(".")
    return ".".join(["blk", layer, _GGUF_PARTS[part], *rest])
