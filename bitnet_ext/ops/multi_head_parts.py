"""Weights, keys and parts of the work of multi-head attention."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.ops.rowwise import rotary_embedding, rotary_embedding_backward

__all__ = ["Cache", "Keys", "Projections", "Tables", "draw_seeds", "flat", "mask_parts", "parts"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tables = tuple[npt.ArrayLike, npt.ArrayLike]


class Projections:
    """The weights w_q, w_k, w_v [heads, d, E] and w_out [H, d_v, E_out], and products with them."""

    def __init__(self, state: Mapping[str, Float32]) -> None:
        self.state = state
        self.rows = {name: w.reshape(-1, w.shape[-1]) for name, w in state.items()}
        # As the projection reads them: a row for each output.
        self._tables = self.rows | {"w_out": np.ascontiguousarray(self.rows["w_out"].T)}

    def project(self, name: str, x: Float32, outputs: int | None = None) -> Float32:
        """x [B, S, n] by the first ``outputs`` columns of a weight -> [B, S, outputs]."""
        return _project(x, self._tables[name][:outputs])

    def before_out(self, d_out: Float32) -> Float32:
        """The gradient [B, H, S, d_v] of what ``w_out`` takes."""
        heads, width, _ = self.state["w_out"].shape
        return split(_project(d_out, self.rows["w_out"]), heads, width)

    def heads(
        self, name: str, x: Float32, heads: int, rope: Tables | None = None, position: int = 0
    ) -> Float32:
        """Projected heads [B, heads, S, d] of x [B, S, E], turned by their positions."""
        width = self.state[name].shape[1]
        y = self.project(name, x, heads * width)
        if rope is not None:
            y = rotary_embedding(y, **_turn(y, rope, heads, position))
        return split(y, heads, width)

    def add_gradients(
        self,
        name: str,
        gradient: Float32,
        x: Float32,
        rope: Tables | None,
        position: int,
        grad_x: Float32,
        grad_weight: Float32,
    ) -> None:
        """From the gradient [B, heads, S, d] of :meth:`heads`: that of x [B, S, E] is added to
        ``grad_x``, that of the weight to ``grad_weight`` [all heads * d, E]."""
        heads = gradient.shape[1]
        y = join(gradient)
        if rope is not None:
            y = rotary_embedding_backward(y, **_turn(y, rope, heads, position))
        y = y.reshape(-1, y.shape[2])
        _core.sum_products(y, _matrix(x), grad_weight[: y.shape[1]])
        _core.sum_products(y.T, self.rows[name][: y.shape[1]], _matrix(grad_x))


def _project(x: Float32, table: Float32) -> Float32:
    y = np.empty((x.shape[0] * x.shape[1], len(table)), np.float32)
    _core.project(_matrix(np.ascontiguousarray(x)), table, "f32", None, None, y)
    return y.reshape(*x.shape[:2], len(table))


def _turn(y: Float32, rope: Tables, heads: int, position: int) -> dict[str, Any]:
    cos, sin = (np.asarray(table, np.float32) for table in rope)
    places = np.broadcast_to(np.arange(position, position + y.shape[1]), y.shape[:2])
    return {
        "cos": cos,
        "sin": sin,
        "position_ids": places,
        "rotary_dim": 2 * cos.shape[-1],
        "num_heads": heads,
    }


def split(y: Float32, heads: int, width: int) -> Float32:
    """[B, S, heads * width] -> a view [B, heads, S, width]."""
    return y.reshape(*y.shape[:2], heads, width).swapaxes(1, 2)


def join(y: Float32) -> Float32:
    """[B, heads, S, width] -> [B, S, heads * width]."""
    rows = np.ascontiguousarray(y.swapaxes(1, 2))
    return rows.reshape(*rows.shape[:2], rows.shape[2] * rows.shape[3])


def _matrix(x: Float32) -> Float32:
    """[B, S, n] -> [B * S, n], a view."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


class Keys:
    """Keys and values of one call, made when a part of the batch asks for them."""

    def __init__(
        self,
        weights: Projections,
        source: Float32,
        rope: Tables | None,
        position: int,
        heads: int,
    ) -> None:
        self._weights, self.heads = weights, heads
        self.source, self.rope, self.position = source, rope, position
        self._held: tuple[Float32, Float32] | None = None

    def read(self, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences."""
        if self._held is not None:
            return self._held[0][part], self._held[1][part]
        x = self.source[part]
        k = self._weights.heads("w_k", x, self.heads, self.rope, self.position)
        return k, self._weights.heads("w_v", x, self.heads)

    def hold(self) -> tuple[Float32, Float32]:
        """Those of all sequences, kept for :meth:`read`."""
        self._held = self.read(slice(None))
        return self._held


class Cache:
    """Keys and values [B, room, heads, d] of which the first ``length`` are filled."""

    def __init__(self, keys: Float32, values: Float32, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def of(cls, keys: Float32, values: Float32) -> Cache:
        return cls(keys.copy(), values.copy(), keys.shape[1])

    def extended(self, keys: Float32, values: Float32) -> Cache:
        """One with more keys.  Room is shared with this one, whose own keys stay as they are."""
        if keys.shape[2] != self.keys.shape[2]:
            raise InvalidShapeError(
                f"cache: found {self.keys.shape[2]} kv heads, wanted {keys.shape[2]}"
            )
        length = self.length + keys.shape[1]
        room = self.keys.shape[1]
        if length > room:
            room = max(length, 2 * room)
            held = (self.keys, self.values)
            grown = [np.empty((a.shape[0], room, *a.shape[2:]), np.float32) for a in held]
            for new, old in zip(grown, held, strict=True):
                new[:, : self.length] = old[:, : self.length]
        else:
            grown = [self.keys, self.values]
        for new, added in zip(grown, (keys, values), strict=True):
            new[:, self.length : length] = added
        return Cache(grown[0], grown[1], length)

    def read(self, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences."""
        k, v = (a[part, : self.length].swapaxes(1, 2) for a in (self.keys, self.values))
        return k, v


def flat(x: Float32) -> Float32:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def parts(batch: int, rows: int, factor: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """Sequences to work on together, and their rows: all, or those of a memory factor."""
    inner = factor if batch == 1 else None
    for part in _slices(batch, factor):
        yield part, list(_slices(rows, inner))


def _slices(n: int, factor: int | None) -> Iterator[slice]:
    size = max(1, -(-n // (factor or 1)))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def mask_parts(
    mask: npt.ArrayLike | None, batch: tuple[int, ...], rows: int
) -> Callable[[slice, slice], Array | None]:
    """The part of a mask of [batch..., H, S, T] for some sequences and rows."""
    if mask is None:
        return lambda part, span: None
    array = np.asarray(mask)
    one_row = array.ndim < 2 or array.shape[-2] == 1
    try:
        if array.ndim > 3:
            array = np.broadcast_to(array, batch + array.shape[-3:])
            array = array.reshape(math.prod(batch), *array.shape[-3:])
        if not one_row and array.shape[-2] != rows:
            raise ValueError
    except ValueError:
        raise InvalidShapeError(
            f"mask: found {array.shape}, wanted it to broadcast to {(*batch, 'H', rows, 'T')}"
        ) from None

    def cut(part: slice, span: slice) -> Array:
        chosen = array[part] if array.ndim > 3 else array
        return chosen if one_row else chosen[..., span, :]

    return cut


def draw_seeds(seed: int | None, batch: int) -> npt.NDArray[np.uint64]:
    first = secrets.randbits(64) if seed is None else seed
    return np.array([(first + b) % 2**64 for b in range(batch)], np.uint64)
