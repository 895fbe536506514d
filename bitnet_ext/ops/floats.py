"""Float operands of the row-wise ops, on the host or on a CUDA device, and their results."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import host_array

Array = npt.NDArray[Any]  # float32 or float16
Float32 = npt.NDArray[np.float32]
Element = TypeVar("Element", bound=np.generic)


def empty(shape: tuple[int, ...], device: Device | None) -> Float32:
    return cast(
        Float32, np.empty(shape, np.float32) if device is None else device.empty(shape, np.float32)
    )


def on_device(name: str, a: npt.ArrayLike, device: Device | None) -> Array:
    """``a`` on the device, or, without one, on the host."""
    if device is None:
        return host_array(name, a)
    if device_of(a) is not None:
        return cast(Array, device.adopt(a))
    return cast(Array, device.to_device(host_array(name, a)))


def floats(name: str, a: npt.ArrayLike, device: Device | None = None) -> Array:
    array = on_device(name, a, device)
    if array.dtype not in (np.float32, np.float16):
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted float32 or float16"
        )
    return array if device is not None or array.flags.aligned else array.copy()


def as_float32(a: Array) -> Float32:
    return a.astype(np.float32, copy=False)


def shaped_as(out: Float32, x: Array) -> Array:
    """The result in the shape and dtype of ``x``."""
    return out.reshape(x.shape).astype(x.dtype, copy=False)


def rows_contiguous(a: npt.NDArray[Element]) -> npt.NDArray[Element]:
    """``a``, copied unless its last axis is contiguous, the others lie ahead of each other, and
    elements are on their boundaries, which those of packed records are not."""
    ahead = a.ndim != 2 or len(a) < 2 or a.strides[0] >= a.shape[1] * a.itemsize
    return a if ahead and a.strides[-1] == a.itemsize and a.flags.aligned else a.copy()
