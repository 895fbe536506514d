"""One transformer layer over a block of packed rows, and the weights it reads.

The order of operations (``h`` is the residual stream, every linear layer is ternary)::

    q, k, v = linear(quantise(norm(h)));  RoPE(q, k);  append k, v;  a = attention(q)
    h += o(quantise(sub_norm(a)))
    h += down(quantise(sub_norm(act(gate) * up))),  gate, up = linear(quantise(norm(h)))
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.memory.workspace import Float32, Views
from bitnet_ext.model.batch import Rows

__all__ = ["Layer", "Linear", "LinearGroup", "Norm", "layer_forward"]


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm; ``kind`` "none" passes its input through."""

    kind: Literal["rms", "layer", "none"]
    eps: float
    weight: Float32 | None = None
    bias: Float32 | None = None


NO_NORM = Norm("none", 0.0)


@dataclass(frozen=True)
class Linear:
    """A ternary linear layer, the norm inside it when it has one, and its bias."""

    weight: _core.PackedTernary
    bias: Float32 | None
    norm: Norm = NO_NORM


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that read the same input, their outputs side by side.

    Fused into one matrix when they quantise the input alike, which only layers with norms of
    their own do not.
    """

    parts: tuple[Linear, ...]

    def apply(
        self, x: Float32, norm: Norm, normed: Float32, q: Any, scales: Float32, out: Float32
    ) -> None:
        """``out[:, parts] = part(quantise(part.norm(norm(x))))``."""
        if len(self.parts) == 1 and self.parts[0].norm is NO_NORM:
            _linear(self.parts[0], x, norm, q, scales, out, residual=False)
            return
        if norm.kind != "none":
            _core.norm(x, norm.weight, norm.bias, norm.eps, norm.kind, normed)
            x = normed
        column = 0
        for part in self.parts:
            width = part.weight.shape[0]
            _linear(part, x, part.norm, q, scales, out[:, column : column + width], residual=False)
            column += width


@dataclass(frozen=True)
class Layer:
    """The weights of one layer."""

    attn_norm: Norm
    qkv: LinearGroup
    attn_sub_norm: Norm
    o: Linear
    ffn_norm: Norm
    gate_up: LinearGroup
    ffn_sub_norm: Norm
    down: Linear


def _linear(
    linear: Linear, x: Float32, norm: Norm, q: Any, scales: Float32, out: Float32, residual: bool
) -> None:
    _core.norm_quant(x, norm.weight, norm.bias, norm.eps, norm.kind, q, scales)
    _core.ternary_linear(q, scales, linear.weight, linear.bias, residual, out)


def layer_forward(
    layer: Layer,
    config: BitNetConfig,
    views: Views,
    hidden: Float32,
    rows: Rows,
    cache: _core.KVCache,
    cache_layer: int,
    rope: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None,
) -> None:
    """Run one layer in place on ``hidden`` [M, E]; ``cache_layer`` of the cache gets K and V."""
    cos, sin = rope if rope is not None else (None, None)
    v = views
    layer.qkv.apply(hidden, layer.attn_norm, v.normed, v.quantised_hidden, v.scales, v.qkv)
    _core.rope_append(v.qkv, cos, sin, cache, cache_layer, rows.seq, rows.pos)
    _core.attend(
        v.qkv,
        cache,
        cache_layer,
        rows.starts,
        rows.first_pos,
        config.head_dim**-0.5,
        v.attention,
    )
    _linear(
        layer.o, v.attention, layer.attn_sub_norm, v.quantised_attention, v.scales, hidden, True
    )
    layer.gate_up.apply(hidden, layer.ffn_norm, v.normed, v.quantised_hidden, v.scales, v.ffn)
    sub = layer.ffn_sub_norm
    _core.act_quant(
        v.ffn,
        config.hidden_act,
        config.gated_ffn,
        sub.weight,
        sub.bias,
        sub.kind,
        sub.eps,
        v.quantised_ffn,
        v.scales,
    )
    _core.ternary_linear(
        v.quantised_ffn, v.scales, layer.down.weight, layer.down.bias, True, hidden
    )
