"""Where a call of multi-head attention works: its arrays, and the kernels for them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import host_array
from bitnet_ext.gpu.scratch import Scratch
from bitnet_ext.ops.attention import attend_into
from bitnet_ext.ops.attention_gradients import add_gradients
from bitnet_ext.ops.operands import Operands

__all__ = [
    "Place",
    "array_here",
    "brought",
    "contiguous_copy",
    "flat",
    "in_place",
    "key_of",
    "matrices",
    "place_name",
    "place_of",
]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


class Place(Protocol):
    """The host, or a device; float32 arrays of one call in scratch of its own."""

    @property
    def device(self) -> Device | None:
        """None for the host."""

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        """An array that may outlive the call."""

    def take(self, name: str, shape: tuple[int, ...]) -> Float32:
        """An intermediate; the latest of a name has its memory."""

    def room(self, wanted: int) -> int:
        """Bytes that intermediates may take, at most ``wanted``."""

    def adopt(self, name: str, value: Any) -> Array:
        """``value`` as an array that is here; one of the host is copied to a device."""

    def table(self, rows: Float32) -> Any:
        """A matrix [V, n] as :meth:`project` reads it."""

    def project(
        self, x: Float32, table: Any, outputs: int, out: Float32, residual: Float32 | None = None
    ) -> None:
        """``out`` [M, outputs] = x [M, n] by the first rows of ``table``, plus ``residual``."""

    def rotate(
        self, y: Float32, tables: Sequence[Float32], position: int, *, backward: bool = False
    ) -> None:
        """Turn the heads of ``y`` [B, H, S, d], in place, from ``position`` on."""

    def attend(self, q: Float32, k: Float32, v: Float32, out: Float32, **options: Any) -> None:
        """``out`` [B, H, S, d_v] = attention, with the options of a part."""

    def add_gradients(
        self, q: Float32, k: Float32, v: Float32, d_out: Float32, grads: Any, **options: Any
    ) -> None:
        """Into ``grads``, (dq, dk, dv, the result again): those of k and v are added."""

    def sum_products(self, a: Float32, b: Float32, out: Float32) -> None:
        """``out[n][k] += sum over m of a[m][n] b[m][k]``, m ascending."""


class _Host:
    device = None

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return np.empty(shape, dtype)

    def take(self, name: str, shape: tuple[int, ...]) -> Float32:
        return np.empty(shape, np.float32)  # the allocator has the memory of the last one

    def room(self, wanted: int) -> int:
        return wanted

    def adopt(self, name: str, value: Any) -> Array:
        return host_array(name, value)

    def table(self, rows: Float32) -> Float32:
        return np.ascontiguousarray(rows)

    def project(
        self, x: Float32, table: Any, outputs: int, out: Float32, residual: Float32 | None = None
    ) -> None:
        _core.project(x, table[:outputs], "f32", None, None, out)
        if residual is not None:
            out += residual

    def rotate(
        self, y: Float32, tables: Sequence[Float32], position: int, *, backward: bool = False
    ) -> None:
        cos, sin = tables
        places = np.tile(np.arange(position, position + y.shape[2]), len(y))
        _core.rotary(y, cos, -sin if backward else sin, places, False, y)

    def attend(self, q: Float32, k: Float32, v: Float32, out: Float32, **options: Any) -> None:
        attend_into(_operands(q, k, v, options), out)

    def add_gradients(
        self, q: Float32, k: Float32, v: Float32, d_out: Float32, grads: Any, **options: Any
    ) -> None:
        add_gradients(_operands(q, k, v, options), d_out, *grads)

    def sum_products(self, a: Float32, b: Float32, out: Float32) -> None:
        _core.sum_products(a, b, out)


class _Card:
    def __init__(self, device: Device, scratch: Scratch) -> None:
        self.device = device
        self._scratch = scratch

    def empty(self, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32) -> Array:
        return cast(Array, self.device.empty(shape, dtype))

    def take(self, name: str, shape: tuple[int, ...]) -> Float32:
        return cast(Float32, self._scratch.take(self.device.empty, name, shape, np.float32))

    def room(self, wanted: int) -> int:
        held = self._scratch.nbytes
        return wanted if wanted <= held else held + self.device.room(wanted - held)

    def adopt(self, name: str, value: Any) -> Array:
        if self.device.owns(value):
            return cast(Array, value)
        if device_of(value) is not None:
            return cast(Array, self.device.adopt(value))
        return cast(Array, self.device.to_device(host_array(name, value)))

    def table(self, rows: Float32) -> Any:
        from bitnet_ext.gpu.tables import DeviceTable

        return DeviceTable.of(self.device, rows)

    def project(
        self, x: Float32, table: Any, outputs: int, out: Float32, residual: Float32 | None = None
    ) -> None:
        from bitnet_ext.gpu.project import project

        project(self.device, x, table.first(outputs), None, out, residual=residual)

    def rotate(
        self, y: Float32, tables: Sequence[Float32], position: int, *, backward: bool = False
    ) -> None:
        from bitnet_ext.gpu.rowwise import rotary

        cos, sin = tables
        rotary(self.device, y, cos, sin, None, False, y, first=position, backward=backward)

    def attend(self, q: Float32, k: Float32, v: Float32, out: Float32, **options: Any) -> None:
        attend_into(_operands(q, k, v, options), out, self.take)

    def add_gradients(
        self, q: Float32, k: Float32, v: Float32, d_out: Float32, grads: Any, **options: Any
    ) -> None:
        dq, dk, dv, out = grads
        add_gradients(_operands(q, k, v, options), d_out, dq, dk, dv, out, self.take)

    def sum_products(self, a: Float32, b: Float32, out: Float32) -> None:
        from bitnet_ext.gpu.sum_products import sum_products

        sum_products(self.device, a, b, out)


def _operands(q: Float32, k: Float32, v: Float32, options: dict[str, Any]) -> Operands:
    return Operands(q, k, v, softcap=0.0, window=None, kv_lengths=None, **options)


def place_of(device: Device | None, *, keep: bool) -> AbstractContextManager[Place]:
    """Where a call works; ``keep``: a device keeps its intermediates for the next."""
    return nullcontext(_Host()) if device is None else _card_of(device, keep)


@contextmanager
def _card_of(device: Device, keep: bool) -> Iterator[Place]:
    if not keep:
        yield _Card(device, Scratch())
        return
    with device.scratch.lease(device.stream) as scratch:
        yield _Card(device, scratch)


def key_of(device: Device | None) -> int | None:
    return None if device is None else device.number


def place_name(device: Device | None) -> str:
    return "the host" if device is None else "a CUDA device"


def array_here(name: str, value: Any, place: Place) -> Array:
    """``value`` as an array where the call works, which it must be on already."""
    found = device_of(value)
    if found is not place.device:
        raise InvalidShapeError(
            f"{name}: found it on {place_name(found)}, wanted it on {place_name(place.device)}"
        )
    return place.adopt(name, value)


def contiguous_copy(place: Place, array: Array) -> Float32:
    """Contiguous float32."""
    copy = place.empty(array.shape)
    copy[...] = array
    return copy


def brought(weight: Float32, place: Place) -> Float32:
    """A copy of a weight of the host on a device, or the other way round."""
    found = device_of(weight)
    return place.adopt("state", weight if found is None else found.to_host(weight))


def in_place(array: Array) -> bool:
    """Whether kernels read an array as it is: contiguous float32, elements on their boundaries."""
    aligned = getattr(array.flags, "aligned", True)  # those of a device always are
    return array.dtype == np.float32 and bool(array.flags.c_contiguous and aligned)


def flat(array: Array) -> Array:
    """[batch..., S, n] -> [B, S, n]."""
    return array.reshape(math.prod(array.shape[:-2]), *array.shape[-2:])


def matrices(place: Place, name: str, array: Array) -> Float32:
    """Contiguous float32 [B, S, n] of any leading axes; a copy only where that is none."""
    rows = flat(array)
    if in_place(rows):
        return rows
    copy = place.take(name, rows.shape)
    copy[...] = rows
    return copy
