"""Weights, keys and parts of the work of multi-head attention."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.ops.multi_head_place import Array, Float32, Place, in_place

__all__ = [
    "Cache",
    "Keys",
    "Projections",
    "check_modes",
    "draw_seeds",
    "mask_parts",
    "matrix",
    "part_sizes",
    "parts",
    "rope_tables",
    "split",
]

Tables = Sequence[Float32]  # cos and sin [positions, n]


class Projections:
    """The weights w_q, w_k, w_v [heads, d, E] and w_out [H, d_v, E_out], and products with them."""

    def __init__(self, place: Place, state: Mapping[str, Float32]) -> None:
        self.state = state
        self.rows = {
            name: w.reshape(w.shape[0] * w.shape[1], w.shape[2]) for name, w in state.items()
        }
        # As the projection reads them: a row for each output.
        self._tables = {name: place.table(rows) for name, rows in self.rows.items()}
        self._back = self._tables["w_out"]
        self._tables["w_out"] = place.table(self.rows["w_out"].T)

    def project_out(
        self, place: Place, joined: Float32, out: Float32, residual: Float32 | None
    ) -> None:
        """``out`` [M, E_out] = ``joined`` [M, H * d_v] by ``w_out``, plus ``residual``."""
        place.project(joined, self._tables["w_out"], out.shape[1], out, residual)

    def before_out(self, place: Place, d_out: Float32) -> Float32:
        """The gradient [B, H, S, d_v] of what ``w_out`` takes."""
        heads, width, _ = self.state["w_out"].shape
        y = place.take("d_joined", (*d_out.shape[:2], heads * width))
        place.project(matrix(d_out), self._back, heads * width, matrix(y))
        return split(y, heads, width)

    def heads(
        self,
        place: Place,
        name: str,
        x: Float32,
        heads: int,
        rope: Tables | None = None,
        position: int = 0,
    ) -> Float32:
        """Projected heads [B, heads, S, d] of x [B, S, E], turned by their positions."""
        width = self.state[name].shape[1]
        y = place.take(name, (*x.shape[:2], heads * width))
        place.project(matrix(x), self._tables[name], heads * width, matrix(y))
        turned = split(y, heads, width)
        if rope is not None:
            place.rotate(turned, rope, position)
        return turned

    def add_gradients(
        self,
        place: Place,
        name: str,
        gradient: Float32,
        x: Float32,
        rope: Tables | None,
        position: int,
        grad_x: Float32,
        grad_weight: Float32,
    ) -> None:
        """From the gradient [B, S, heads * d] of :meth:`heads`, which is turned back: that of x
        [B, S, E] is added to ``grad_x``, that of the weight to ``grad_weight`` [all heads * d, E].
        """
        outputs, width = gradient.shape[2], self.state[name].shape[1]
        if rope is not None:
            turned = split(gradient, outputs // width, width)
            place.rotate(turned, rope, position, backward=True)
        y = matrix(gradient)
        place.sum_products(y, matrix(x), grad_weight[:outputs])
        place.sum_products(y.T, self.rows[name][:outputs], matrix(grad_x))


def split(y: Float32, heads: int, width: int) -> Float32:
    """[B, S, heads * width] -> a view [B, heads, S, width]."""
    return y.reshape(*y.shape[:2], heads, width).swapaxes(1, 2)


def matrix(x: Float32) -> Float32:
    """[B, S, n] -> [B * S, n], a view."""
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2])


def check_modes(
    cache_kv: bool, use_cached_kv: bool, append_kv: bool, only_first: bool, factor: int | None
) -> None:
    if cache_kv + use_cached_kv + append_kv > 1:
        raise InvalidShapeError(
            "cache_kv, use_cached_kv, append_kv: found more than one, wanted one or none"
        )
    if only_first and not cache_kv:
        raise InvalidShapeError("only_cache_first_head_kv: wanted together with cache_kv")
    if factor is not None and factor < 1:
        raise InvalidShapeError(f"save_peak_mem_factor: found {factor}, wanted 1 or more")


def rope_tables(place: Place, rope: Any, positions: int, width: int) -> Tables:
    """cos and sin for so many positions of heads of so many elements, where the call works."""
    cos, sin = (place.adopt("rope", table) for table in rope)
    fit = cos.ndim == 2 and cos.shape == sin.shape and 2 <= 2 * cos.shape[1] <= width
    if not fit or len(cos) < positions:
        raise InvalidShapeError(
            f"rope: found {cos.shape} and {sin.shape}, wanted two tables [positions, n] of at "
            f"least {positions} positions and n from 1 to {width // 2}"
        )
    return [_whole(place, table) for table in (cos, sin)]


def _whole(place: Place, array: Array) -> Float32:
    if in_place(array):
        return array
    copy = place.empty(array.shape)
    copy[...] = array
    return copy


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

    @property
    def width(self) -> int:
        """Elements of a key and its value, all heads'; none where they are held."""
        each = sum(self._weights.state[name].shape[1] for name in ("w_k", "w_v"))
        return 0 if self._held else self.heads * each

    def read(self, place: Place, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences, until the next are read."""
        if self._held is not None:
            return self._held[0][part], self._held[1][part]
        x = self.source[part]
        k = self._weights.heads(place, "w_k", x, self.heads, self.rope, self.position)
        return k, self._weights.heads(place, "w_v", x, self.heads)

    def hold(self, place: Place) -> tuple[Float32, Float32]:
        """Those of all sequences, kept for :meth:`read`."""
        self._held = self.read(place, slice(None))
        return self._held


class Cache:
    """Keys and values [B, room, heads, d] of which the first ``length`` are filled."""

    width = 0  # nothing to compute

    def __init__(self, keys: Float32, values: Float32, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def of(cls, place: Place, keys: Float32, values: Float32) -> Cache:
        """A copy of keys and values [B, T, heads, d]."""
        copies = place.empty(keys.shape), place.empty(values.shape)
        for copy, array in zip(copies, (keys, values), strict=True):
            copy[...] = array
        return cls(*copies, keys.shape[1])

    def extended(self, place: Place, keys: Float32, values: Float32) -> Cache:
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
            grown = [place.empty((a.shape[0], room, *a.shape[2:])) for a in held]
            for new, old in zip(grown, held, strict=True):
                new[:, : self.length] = old[:, : self.length]
        else:
            grown = [self.keys, self.values]
        for new, added in zip(grown, (keys, values), strict=True):
            new[:, self.length : length] = added
        return Cache(grown[0], grown[1], length)

    def first_heads(self, count: int) -> Cache:
        """A view of its first heads, at most so many."""
        return Cache(self.keys[:, :, :count], self.values[:, :, :count], self.length)

    def read(self, place: Place, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences."""
        k, v = (a[part, : self.length].swapaxes(1, 2) for a in (self.keys, self.values))
        return k, v


def parts(batch: int, rows: int, sizes: tuple[int, int]) -> Iterator[tuple[slice, list[slice]]]:
    """At most so many sequences to work on together, and at most so many of their rows."""
    for part in _slices(batch, sizes[0]):
        yield part, list(_slices(rows, sizes[1]))


def _slices(n: int, size: int) -> Iterator[slice]:
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def part_sizes(
    place: Place, batch: int, rows: int, factor: int | None, row_floats: int, key_floats: int
) -> tuple[int, int]:
    """Sequences, and rows of each, to work on together: those of a memory factor, or what there is
    room for.

    Args:
        row_floats: intermediates of a row.
        key_floats: intermediates of a sequence beside its rows'.
    """
    batch, rows = max(batch, 1), max(rows, 1)
    if factor is not None:
        return -(-batch // factor), -(-rows // factor) if batch == 1 else rows
    sequence = 4 * (key_floats + rows * row_floats)
    room = place.room(batch * sequence)
    if room >= sequence:
        count = -(-batch // (room // sequence))
        return -(-batch // count), rows
    room = (room - 4 * key_floats) // (4 * row_floats)
    return 1, max(1, room)


def mask_parts(
    place: Place, mask: Any, batch: tuple[int, ...], rows: int
) -> Callable[[slice, slice], Array | None]:
    """The part of a mask of [batch..., H, S, T] for some sequences and rows."""
    if mask is None:
        return lambda part, span: None
    array = _mask_of_batch(place, mask, batch, rows)
    one_row = array.ndim < 2 or array.shape[-2] == 1

    def cut(part: slice, span: slice) -> Array:
        chosen = array[part] if array.ndim > 3 else array
        return chosen if one_row else chosen[..., span, :]

    return cut


def _mask_of_batch(place: Place, mask: Any, batch: tuple[int, ...], rows: int) -> Array:
    """A mask of three axes or fewer, or with one axis for all of ``batch``."""
    array = place.adopt("mask", mask)
    lead, shape = array.shape[:-3], array.shape
    try:
        fit = np.broadcast_shapes(lead, batch) == batch
    except ValueError:
        fit = False
    if not fit or (array.ndim > 1 and shape[-2] not in (1, rows)):
        raise InvalidShapeError(
            f"mask: found {shape}, wanted it to broadcast to {(*batch, 'H', rows, 'T')}"
        )
    if not lead or math.prod(lead) == 1 != math.prod(batch):
        return array.reshape(shape[-3:])
    if math.prod(lead) != math.prod(batch):
        whole = place.empty((*batch, *shape[-3:]), array.dtype)
        whole[...] = array
        array = whole
    return array.reshape(math.prod(batch), *shape[-3:])


def draw_seeds(seed: int | None, batch: int) -> range:
    """A seed for each sequence, to be taken mod 2^64."""
    first = secrets.randbits(64) if seed is None else seed
    return range(first, first + batch)
