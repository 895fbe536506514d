"""One call of multi-head attention, and its gradients by computing its parts again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.ops.attention import add_gradients
from bitnet_ext.ops.multi_head_parts import (
    Array,
    Cache,
    Float32,
    Keys,
    Projections,
    Tables,
    join,
    parts,
)
from bitnet_ext.ops.operands import Operands

__all__ = ["Call", "MultiHeadGradients", "gradients"]


class MultiHeadGradients(NamedTuple):
    """What :meth:`MultiHeadAttention.backward` gives."""

    x: Array
    x_kv: Array | None
    weights: dict[str, Float32]


@dataclass(frozen=True)
class Call:
    """Everything that decides the result of one call."""

    weights: Projections
    batch: tuple[int, ...]
    rows: Float32  # x, [B, S, E]
    keys: Keys | None  # of this call, None where they came from the cache alone
    attended: Keys | Cache
    causal: bool
    past: int
    pattern: Callable[[slice, slice], Array | None]
    rope: Tables | None
    scale: float | None
    dropout_p: float
    seeds: npt.NDArray[np.uint64] | None
    add_input: bool
    factor: int | None
    dtype: np.dtype[Any]  # of x
    kv_dtype: np.dtype[Any] | None  # of x_kv, None where it took no part

    def parts(self) -> Iterator[tuple[slice, list[slice]]]:
        """Sequences to work on together, and their rows."""
        return parts(self.rows.shape[0], self.rows.shape[1], self.factor)

    def queries(self, part: slice, span: slice) -> Float32:
        """q [B, H, S, d_k] of a part."""
        heads = self.weights.state["w_q"].shape[0]
        x = self.rows[part, span]
        return self.weights.heads("w_q", x, heads, self.rope, self.past + span.start)

    def options(self, part: slice, span: slice) -> dict[str, Any]:
        """Of the attention of a part."""
        return {
            "causal": self.causal,
            "past_len": self.past + span.start,
            "mask": self.pattern(part, span),
            "scale": self.scale,
            "dropout_p": 0.0 if self.seeds is None else self.dropout_p,
            "seed": None if self.seeds is None else self.seeds[part],
        }


def gradients(call: Call, d_out: Float32) -> MultiHeadGradients:
    """The gradients of a call, part by part; ``d_out`` [B, S, E_out].

    Every sum goes over sequences, then rows, in one order, whatever the parts.
    """
    weights = call.weights
    grads = {name: np.zeros(rows.shape, np.float32) for name, rows in weights.rows.items()}
    grad_x = d_out.copy() if call.add_input else np.zeros_like(call.rows)
    keys = call.keys
    own = keys is not None and keys.source is call.rows
    grad_source = grad_x if own or keys is None else np.zeros_like(keys.source)
    for part, spans in call.parts():
        k, v = call.attended.read(part)
        grad_k, grad_v = np.zeros_like(k), np.zeros_like(v)
        for span in spans:
            grad_q = _attention_part(call, part, span, d_out, (k, v, grad_k, grad_v), grads)
            x, to, position = call.rows[part, span], grad_x[part, span], call.past + span.start
            weights.add_gradients("w_q", grad_q, x, call.rope, position, to, grads["w_q"])
        if keys is None:
            continue
        x, to = keys.source[part], grad_source[part]
        new = slice(grad_k.shape[2] - keys.source.shape[1], None)  # behind those of the cache
        for name, gradient, rope in (("w_k", grad_k, call.rope), ("w_v", grad_v, None)):
            weights.add_gradients(name, gradient[:, :, new], x, rope, call.past, to, grads[name])
    return MultiHeadGradients(
        _shaped(grad_x, call.batch, call.dtype),
        None if call.kv_dtype is None else _shaped(grad_source, call.batch, call.kv_dtype),
        {name: grads[name].reshape(weights.state[name].shape) for name in grads},
    )


def _attention_part(
    call: Call,
    part: slice,
    span: slice,
    d_out: Float32,
    keys: tuple[Float32, Float32, Float32, Float32],
    grads: dict[str, Float32],
) -> Float32:
    """Through ``w_out`` and the attention: the gradient of q; those of k, v and w_out are added."""
    k, v, grad_k, grad_v = keys
    operands = Operands(
        call.queries(part, span), k, v, softcap=0.0, window=None, kv_lengths=None,
        **call.options(part, span),
    )  # fmt: skip
    gradient = np.ascontiguousarray(d_out[part, span])
    attended = np.empty(operands.out_shape, np.float32)
    before = call.weights.before_out(gradient)
    grad_q = add_gradients(operands, before, grad_k, grad_v, attended)
    joined = join(attended)
    _core.sum_products(
        joined.reshape(-1, joined.shape[2]),
        gradient.reshape(-1, gradient.shape[2]),
        grads["w_out"],
    )
    return grad_q


def _shaped(gradient: Float32, batch: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return gradient.reshape(*batch, *gradient.shape[1:]).astype(dtype, copy=False)
