"""One call of multi-head attention, and its gradients by computing its parts again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from bitnet_ext.ops.multi_head_parts import (
    Cache,
    Keys,
    Projections,
    Tables,
    matrix,
    part_sizes,
    parts,
    split,
)
from bitnet_ext.ops.multi_head_place import Array, Float32, Place

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
    seeds: range | None
    add_input: bool
    factor: int | None
    dtype: np.dtype[Any]  # of x
    kv_dtype: np.dtype[Any] | None  # of x_kv, None where it took no part

    def forward(self, place: Place, out: Float32) -> None:
        """The result, [B, S, E_out]."""
        heads, width, _ = self.weights.state["w_out"].shape
        for part, spans in self._parts(place, 1):
            k, v = self.attended.read(place, part)
            for span in spans:
                q, to = self.queries(place, part, span), out[part, span]
                joined = place.take("joined", (*to.shape[:2], heads * width))
                attended = split(joined, heads, width)
                place.attend(q, k, v, attended, **self.options(part, span))
                residual = matrix(self.rows[part, span]) if self.add_input else None
                self.weights.project_out(place, matrix(joined), matrix(to), residual)

    def backward_parts(self, place: Place) -> Iterator[tuple[slice, list[slice]]]:
        """As :meth:`forward` has them, each with twice the intermediates and more."""
        return self._parts(place, 2)

    def _parts(self, place: Place, times: int) -> Iterator[tuple[slice, list[slice]]]:
        batch, rows, _ = self.rows.shape
        heads, d_k, _ = self.weights.state["w_q"].shape
        each = heads * (d_k + self.weights.state["w_out"].shape[1] + 2)
        keys = 0 if self.keys is None else self.keys.source.shape[1] * self.attended.width
        sizes = part_sizes(place, batch, rows, self.factor, times * each, times * keys)
        return parts(batch, rows, sizes)

    def queries(self, place: Place, part: slice, span: slice) -> Float32:
        """q [B, H, S, d_k] of a part."""
        heads = self.weights.state["w_q"].shape[0]
        x = self.rows[part, span]
        return self.weights.heads(place, "w_q", x, heads, self.rope, self.past + span.start)

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


def gradients(place: Place, call: Call, d_out: Float32) -> MultiHeadGradients:
    """The gradients of a call, part by part; ``d_out`` [B, S, E_out].

    Every sum goes over sequences, then rows, in one order, whatever the parts.
    """
    weights = call.weights
    grads = {name: _zeros(place, rows.shape) for name, rows in weights.rows.items()}
    grad_x = _zeros(place, call.rows.shape)
    if call.add_input:
        grad_x[...] = d_out
    keys = call.keys
    own = keys is not None and keys.source is call.rows
    grad_source = grad_x if own or keys is None else _zeros(place, keys.source.shape)
    for part, spans in call.backward_parts(place):
        k, v = call.attended.read(place, part)
        grad_k, grad_v = (_key_gradients(place, n, a) for n, a in (("d_k", k), ("d_v", v)))
        for span in spans:
            kept = k, v, _heads(grad_k, k), _heads(grad_v, v)
            grad_q = _attention_part(place, call, part, span, d_out, kept, grads["w_out"])
            x, to, position = call.rows[part, span], grad_x[part, span], call.past + span.start
            weights.add_gradients(place, "w_q", grad_q, x, call.rope, position, to, grads["w_q"])
        if keys is None:
            continue
        x, to, past = keys.source[part], grad_source[part], grad_k.shape[1] - keys.source.shape[1]
        for name, gradient, rope in (("w_k", grad_k, call.rope), ("w_v", grad_v, None)):
            new = gradient
            if past:  # behind those of the cache
                new = place.take("d_new", (len(gradient), x.shape[1], gradient.shape[2]))
                new[...] = gradient[:, past:]
            weights.add_gradients(place, name, new, x, rope, call.past, to, grads[name])
    return MultiHeadGradients(
        _shaped(grad_x, call.batch, call.dtype),
        None if call.kv_dtype is None else _shaped(grad_source, call.batch, call.kv_dtype),
        {name: grads[name].reshape(weights.state[name].shape) for name in grads},
    )


def _attention_part(
    place: Place,
    call: Call,
    part: slice,
    span: slice,
    d_out: Float32,
    keys: tuple[Float32, Float32, Float32, Float32],
    grad_weight: Float32,
) -> Float32:
    """Through ``w_out`` and the attention: the gradient of q, [B, S, H * d_k]; those of k, v and
    w_out are added."""
    k, v, grad_k, grad_v = keys
    q, gradient = call.queries(place, part, span), d_out[part, span]
    before = call.weights.before_out(place, gradient)
    joined = place.take("joined", (*gradient.shape[:2], before.shape[1] * before.shape[3]))
    grad_q = place.take("d_q", (*gradient.shape[:2], q.shape[1] * q.shape[3]))
    grads = _heads(grad_q, q), grad_k, grad_v, _heads(joined, before)
    place.add_gradients(q, k, v, before, grads, **call.options(part, span))
    place.sum_products(matrix(joined), matrix(gradient), grad_weight)
    return grad_q


def _zeros(place: Place, shape: tuple[int, ...]) -> Float32:
    array = place.empty(shape)
    array[...] = 0
    return array


def _key_gradients(place: Place, name: str, like: Float32) -> Float32:
    """Zeros [B, T, heads * d] for the gradient of keys [B, heads, T, d]."""
    batch, heads, tokens, width = like.shape
    sums = place.take(name, (batch, tokens, heads * width))
    sums[...] = 0
    return sums


def _heads(y: Float32, like: Float32) -> Float32:
    """The view [B, heads, S, d] of [B, S, heads * d]."""
    return split(y, like.shape[1], like.shape[3])


def _shaped(gradient: Float32, batch: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    return gradient.reshape(*batch, *gradient.shape[1:]).astype(dtype, copy=False)
