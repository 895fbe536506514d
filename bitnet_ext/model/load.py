"""Weights of a model, packed from a checkpoint or drawn at random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import UnsupportedModelError
from bitnet_ext.model.layers import NO_NORM, Layer, Linear, Norm

if TYPE_CHECKING:
    from bitnet_ext.checkpoint import TernarySource

__all__ = ["RandomWeights", "Table", "WeightSource", "Weights", "load_weights"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Table:
    """Rows over the vocabulary as stored: float32, bits of f16 or bf16, or int8 with row scales."""

    data: npt.NDArray[Any]  # [V, E]
    dtype: Literal["f32", "f16", "bf16", "int8"]
    scales: Float32 | None = None  # [V], int8 only


class WeightSource(Protocol):
    """Where tensors come from: a checkpoint, or random numbers."""

    config: BitNetConfig

    def has(self, name: str) -> bool: ...
    def ternary(self, name: str) -> TernarySource: ...
    def dense(self, name: str) -> Float32: ...
    def table(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Weights:
    """Everything a forward pass reads."""

    layers: tuple[Layer, ...]
    embedding: Table
    head: Table
    head_bias: Float32 | None
    positions: Float32 | None
    final_norm: Norm


def load_weights(
    source: WeightSource,
    head: Literal["exact", "int8"] = "exact",
    progress: Callable[[int, int], None] | None = None,
) -> Weights:
    """Pack every layer straight from the source; ``progress(done, total)`` after each."""
    config = source.config
    layers = []
    for i in range(config.num_layers):
        layers.append(_load_layer(source, f"layers.{i}."))
        if progress is not None:
            progress(i + 1, config.num_layers)
    embedding = _table(source, "embed")
    projection = embedding if config.tie_word_embeddings else _table(source, "head")
    if head == "int8":
        projection = Table(*_quantised(projection))
    return Weights(
        layers=tuple(layers),
        embedding=embedding,
        head=projection,
        head_bias=source.dense("head.bias") if config.head_bias else None,
        positions=source.dense("positions") if config.position == "learned" else None,
        final_norm=_norm(source, "final_norm"),
    )


def _quantised(table: Table) -> tuple[npt.NDArray[np.int8], Literal["int8"], Float32]:
    data, scales = _core.quantise_head(table.data, table.dtype)
    return data, "int8", scales


def _table(source: WeightSource, name: str) -> Table:
    found = source.table(name)
    return Table(found.data, found.dtype)


def _load_layer(source: WeightSource, prefix: str) -> Layer:
    config = source.config
    qkv = ("qkv",) if config.fused_qkv else ("q", "k", "v")
    gate_up = ("gate", "up") if config.gated_ffn else ("up",)
    return Layer(
        attn_norm=_norm(source, prefix + "attn_norm"),
        qkv=_group(source, prefix, qkv),
        o=_linear(source, prefix, "o", "attn_sub_norm", config.attn_sub_norm),
        ffn_norm=_norm(source, prefix + "ffn_norm") if config.ffn_norm else NO_NORM,
        gate_up=_group(source, prefix, gate_up),
        down=_linear(source, prefix, "down", "ffn_sub_norm", config.ffn_sub_norm),
    )


def _norm(source: WeightSource, name: str) -> Norm:
    config = source.config
    bias = source.dense(name + ".bias") if source.has(name + ".bias") else None
    return Norm(config.norm, config.norm_eps, source.dense(name + ".weight"), bias)


def _inner_norm(
    source: WeightSource, prefix: str, sub_norm: str, linear: str, has_sub_norm: bool
) -> Norm:
    """The norm in front of the o or down projection: a sub-norm, or the linear layer's own."""
    config = source.config
    if has_sub_norm and config.linear_norm:
        raise UnsupportedModelError(
            f"{prefix}{sub_norm}: found together with a norm inside {linear}, wanted one of them"
        )
    if has_sub_norm:
        return _norm(source, prefix + sub_norm)
    return _own_norm(source, prefix + linear)


def _own_norm(source: WeightSource, name: str) -> Norm:
    config = source.config
    if not config.linear_norm:
        return NO_NORM
    return Norm("rms", config.linear_norm_eps, source.dense(name + ".norm.weight"))


def _bias(source: WeightSource, name: str) -> Float32 | None:
    return source.dense(name + ".bias") if source.has(name + ".bias") else None


def _linear(
    source: WeightSource, prefix: str, name: str, sub_norm: str, has_sub_norm: bool
) -> Linear:
    return Linear(
        _pack([source.ternary(prefix + name)]),
        _bias(source, prefix + name),
        _inner_norm(source, prefix, sub_norm, name, has_sub_norm),
    )


def _group(source: WeightSource, prefix: str, names: tuple[str, ...]) -> tuple[Linear, ...]:
    if source.config.linear_norm:
        return tuple(
            Linear(
                _pack([source.ternary(prefix + name)]),
                _bias(source, prefix + name),
                _own_norm(source, prefix + name),
            )
            for name in names
        )
    sources = [source.ternary(prefix + name) for name in names]
    biases = [_bias(source, prefix + name) for name in names]
    joined = None
    if any(bias is not None for bias in biases):
        joined = np.concatenate(
            [
                np.zeros(part.shape[0], np.float32) if bias is None else bias
                for part, bias in zip(sources, biases, strict=True)
            ]
        )
    return (Linear(_pack(sources), joined),)


def _pack(sources: list[TernarySource]) -> _core.PackedTernary:
    packed = _core.PackedTernary.from_sources(
        [
            (s.name, s.kind, s.data, s.shape[0], s.shape[1], s.scale, s.divide, s.row_order)
            for s in sources
        ],
        "auto",
    )
    for source in sources:
        source.release()
    return packed


class RandomWeights:
    """Random tensors of a configuration's shape, for benches and tests."""

    def __init__(self, config: BitNetConfig, seed: int = 0) -> None:
        self.config = config
        self._seed = seed

    def _rng(self, name: str) -> np.random.Generator:
        # Keyed by name, so that a tensor does not depend on the order of loading.
        return np.random.default_rng([self._seed, *name.encode()])

    def has(self, name: str) -> bool:
        """Whether the configuration has a tensor of this canonical name."""
        stem, _, last = name.rpartition(".")
        kind = stem.rpartition(".")[2]
        if last != "bias":
            return True
        if kind in ("q", "k", "v", "qkv", "o"):
            return self.config.attention_bias
        if kind in ("gate", "up", "down"):
            return self.config.ffn_bias
        return self.config.norm == "layer"

    def _shape(self, name: str) -> tuple[int, int]:
        c = self.config
        return {
            "q": (c.q_size, c.hidden_size),
            "k": (c.kv_size, c.hidden_size),
            "v": (c.kv_size, c.hidden_size),
            "qkv": (c.q_size + 2 * c.kv_size, c.hidden_size),
            "o": (c.hidden_size, c.q_size),
            "gate": (c.intermediate_size, c.hidden_size),
            "up": (c.intermediate_size, c.hidden_size),
            "down": (c.hidden_size, c.intermediate_size),
        }[name.rpartition(".")[2]]

    def ternary(self, name: str) -> TernarySource:
        """Uniform -1, 0, 1 with a scale that keeps activations near unit size."""
        from bitnet_ext.checkpoint import TernarySource

        n, k = self._shape(name)
        codes = self._rng(name).integers(-1, 2, (n, k), np.int8)
        scale = float(np.float32((1.5 / k) ** 0.5))
        divide = self.config.scale_rule == "divide"
        return TernarySource(
            name=name,
            kind="codes",
            data=codes,
            shape=(n, k),
            scale=float(np.float32(1 / scale)) if divide else scale,
            divide=divide,
            row_order=None,
        )

    def dense(self, name: str) -> Float32:
        """Norm weights near one, biases and positions near zero."""
        c = self.config
        rng = self._rng(name)
        if name == "positions":
            shape = (c.max_position_embeddings, c.hidden_size)
            return rng.standard_normal(shape, np.float32) * np.float32(0.02)
        stem, _, last = name.rpartition(".")
        kind = stem.rpartition(".")[2]
        if kind == "head":
            size = c.vocab_size
        elif kind == "norm":  # the norm inside a linear layer: as wide as its input
            size = self._shape(stem.rpartition(".")[0])[1]
        elif kind == "attn_sub_norm":
            size = c.q_size
        elif kind == "ffn_sub_norm":
            size = c.intermediate_size
        elif kind in ("attn_norm", "ffn_norm", "final_norm"):
            size = c.hidden_size
        else:
            size = self._shape(stem)[0]
        noise = rng.standard_normal(size, np.float32) * np.float32(0.1)
        return noise + np.float32(1) if last == "weight" else noise

    def table(self, name: str) -> Table:
        """bf16 rows, drawn a block at a time to stay small."""
        c = self.config
        rng = self._rng(name)
        bits = np.empty((c.vocab_size, c.hidden_size), np.uint16)
        for low in range(0, c.vocab_size, 4096):
            block = rng.standard_normal((min(4096, c.vocab_size - low), c.hidden_size), np.float32)
            bits[low : low + len(block)] = block.view(np.uint32) >> 16
        return Table(bits, "bf16")
