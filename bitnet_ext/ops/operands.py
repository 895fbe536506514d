"""Operands and options of attention and its gradients, checked, as the kernels read them."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.arguments import FAR, whole_number, window_extents
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import host_array

__all__ = ["Operands", "bits", "operand"]

Array = npt.NDArray[Any]
Window = tuple[int, int]

_KNOWN = frozenset([np.dtype(np.float32), np.dtype(np.float16)])  # a name takes a microsecond


class Operands:
    """q, k, v and the options that decide which keys a query sees and how.

    ``options`` are the kernels' arguments from ``mask`` to ``dropout_p``.  Everything is where q
    is: on the host, or on ``device``, to which a mask, lengths and seeds of the host are copied.
    """

    def __init__(
        self,
        q: npt.ArrayLike,
        k: npt.ArrayLike,
        v: npt.ArrayLike,
        *,
        causal: bool,
        past_len: int,
        mask: npt.ArrayLike | None,
        scale: float | None,
        softcap: float,
        window: Window | None,
        kv_lengths: npt.ArrayLike | None,
        dropout_p: float,
        seed: npt.ArrayLike | None,
    ) -> None:
        self.device = place = device_of(q)
        self.arrays = operand("q", q, place), operand("k", k, place), operand("v", v, place)
        query, keys, values = self.arrays
        self.batch = _batch(query, keys, values)
        self.rows = (*self.batch, *query.shape[-3:-1])  # [..., Hq, Tq]
        self.k_len = keys.shape[-2]
        self.out_shape = (*self.rows, values.shape[-1])
        past = whole_number("past_len", past_len, FAR)
        lengths = (
            None if kv_lengths is None else _lengths(kv_lengths, self.batch, self.k_len, place)
        )
        if lengths is not None and past:
            raise InvalidShapeError(
                f"past_len: found {past} together with kv_lengths, which place the queries; "
                "wanted one"
            )
        left, right = window_extents(window)
        self.options = (
            None if mask is None else _mask(mask, self.rows, self.k_len, place),
            lengths,
            _seeds(seed, self.batch, place) if _dropout(dropout_p, seed) else None,
            causal,
            past,
            left,
            right,
            _scale(scale, query.shape[-1]),
            _finite("softcap", softcap, 0.0),
            dropout_p,
        )

    def views(self) -> tuple[Array, Array, Array]:
        """q, k and v with all leading axes."""
        q, k, v = self.arrays
        if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:  # else NumPy would take microseconds
            q, k, v = (np.broadcast_to(a, self.batch + a.shape[-3:]) for a in self.arrays)
        return bits(q), bits(k), bits(v)


def operand(name: str, value: npt.ArrayLike, device: Device | None = None) -> Array:
    """An array of three axes or more with a contiguous last one; a copy only where it is not, or
    where elements are off their boundaries, as in packed records."""
    found = device_of(value)
    if found is not device:
        places = ["the host" if at is None else "a CUDA device" for at in (found, device)]
        raise InvalidShapeError(f"{name}: found it on {places[0]}, wanted it on {places[1]}")
    array: Array = host_array(name, value) if device is None else _adopted(value, device)
    if array.ndim < 3 or not _is_float(array.dtype):
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted float32, float16 or bfloat16 "
            "[..., H, T, D]"
        )
    return _rows(array, device)


def _adopted(value: Any, device: Device) -> Array:
    return cast(Array, value if device.owns(value) else device.adopt(value))


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype in _KNOWN or dtype.name == "bfloat16"


def _rows(array: Array, device: Device | None) -> Array:
    if device is not None:
        return cast(Array, device.rows_contiguous(array))
    contiguous = array.shape[-1] < 2 or array.strides[-1] == array.itemsize
    return array if contiguous and array.flags.aligned else array.copy()


def bits(array: Array) -> Array:
    if array.dtype in _KNOWN or array.dtype.name != "bfloat16":
        return array
    return array.view(np.uint16)


def _batch(q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """The common leading axes of operands that fit each other."""
    heads, kv_heads = q.shape[-3], k.shape[-3]
    fit = (
        k.shape[-1] == q.shape[-1]
        and v.shape[-3:-1] == k.shape[-3:-1]
        and (heads % kv_heads == 0 if kv_heads else heads == 0)
    )
    batch = q.shape[:-3]
    try:
        if not batch == k.shape[:-3] == v.shape[:-3]:
            batch = np.broadcast_shapes(batch, k.shape[:-3], v.shape[:-3])
    except ValueError:
        fit = False
    if not fit:
        raise InvalidShapeError(
            f"q, k, v: found {q.shape}, {k.shape}, {v.shape}, wanted [..., Hq, Tq, Dk], "
            "[..., Hkv, Tk, Dk], [..., Hkv, Tk, Dv] with Hq a multiple of Hkv"
        )
    return batch


def _mask(value: npt.ArrayLike, shape: tuple[int, ...], k_len: int, device: Device | None) -> Array:
    """The mask as a view [..., Hq, Tq, keys], keys <= Tk; on a device before broadcasting."""
    found = device_of(value)
    mask = host_array("mask", value) if device is None or found is None else _adopted(value, device)
    if mask.dtype == np.float64:
        mask = mask.astype(np.float32)
    if mask.ndim == 0:
        mask = mask.reshape(1)
    wanted = f"bool or float broadcast to {(*shape, k_len)}, the last axis perhaps shorter"
    if (mask.dtype != np.bool_ and not _is_float(mask.dtype)) or mask.shape[-1] > max(k_len, 1):
        raise InvalidShapeError(f"mask: found {mask.dtype} {mask.shape}, wanted {wanted}")
    whole = (*shape, mask.shape[-1])
    try:
        if device is None:
            return bits(np.broadcast_to(mask if mask.flags.aligned else mask.copy(), whole))
        if np.broadcast_shapes(mask.shape, whole) == whole:
            return _rows(device.to_device(mask) if found is None else mask, device)
    except ValueError:
        pass
    raise InvalidShapeError(f"mask: found {mask.shape}, wanted {wanted}")


def _lengths(
    value: npt.ArrayLike, batch: tuple[int, ...], k_len: int, device: Device | None
) -> Any:
    if device_of(value) is not None and device is not None:  # clamped there
        return _copied("kv_lengths", value, batch, np.int64, device)
    lengths = _integers("kv_lengths", value, batch)
    if lengths.size and (lengths.min() < 0 or lengths.max() > k_len):
        raise InvalidShapeError(f"kv_lengths: found {value!r}, wanted 0 to {k_len}")
    lengths = lengths.astype(np.int64)
    return lengths if device is None else device.to_device(lengths)


def _seeds(value: Any, batch: tuple[int, ...], device: Device | None) -> Any:
    """uint64 [B]; on a device one for all is an int, and a range stays one."""
    if isinstance(value, range):
        if device is not None:
            return value
        value = np.array([seed % 2**64 for seed in value], np.uint64)
    if device_of(value) is not None and device is not None:
        return _copied("seed", value, batch, np.uint64, device)
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.uint64(value & 0xFFFFFFFFFFFFFFFF)
    seeds = _integers("seed", value, batch).astype(np.uint64)
    if device is None:
        return seeds
    return int(value) if np.ndim(value) == 0 else device.to_device(seeds)


def _integers(name: str, value: Any, batch: tuple[int, ...]) -> Array:
    array = host_array(name, value)
    if array.dtype.kind in "iu" or array.size == 0:
        try:
            return np.ascontiguousarray(np.broadcast_to(array, batch)).reshape(-1)
        except ValueError:
            pass
    raise InvalidShapeError(f"{name}: found {value!r}, wanted integers {batch}")


def _copied(name: str, value: Any, batch: tuple[int, ...], dtype: Any, device: Device) -> Any:
    """Integers [B] of a device's array, their values unseen."""
    array = _adopted(value, device)
    tail = batch[len(batch) - array.ndim :] if array.ndim <= len(batch) else ()
    fits = len(tail) == array.ndim and all(
        n in (1, wanted) for n, wanted in zip(array.shape, tail, strict=True)
    )
    if array.dtype.kind not in "iu" or not fits:
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted integers {batch}"
        )
    copy = device.empty(batch, dtype)
    copy[...] = array
    return copy.reshape(-1)


def _finite(name: str, value: float, least: float = -math.inf) -> float:
    if not math.isfinite(value) or value < least:
        raise InvalidShapeError(f"{name}: found {value!r}, wanted a finite number >= {least}")
    return float(value)


def _scale(scale: float | None, dk: int) -> float:
    return 1.0 / math.sqrt(max(dk, 1)) if scale is None else _finite("scale", scale)


def _dropout(dropout_p: float, seed: Any) -> bool:
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidShapeError(f"dropout_p: found {dropout_p!r}, wanted 0 <= p < 1")
    if dropout_p and seed is None:
        raise InvalidShapeError("seed: found None, wanted an integer where dropout_p > 0")
    return dropout_p > 0.0
