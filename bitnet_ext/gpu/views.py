"""Arrays of any strides as kernels take them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.device import Device

__all__ = ["KINDS", "address", "flat", "vectors"]

KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}  # as in kinds.cuh


def vectors(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """A kernel's arguments for ``[..., H, T, D]`` with leading axes broadcast to ``batch``: data,
    kind, strides of batch, head and row; then its int8 scales, none."""
    array, strides = flat(device, array, (*batch, *array.shape[-3:]), 3)
    return [array, np.int32(KINDS[array.dtype.name]), *map(np.int64, strides[:-1]), None]


def flat(
    device: Device, array: Any, shape: tuple[int, ...], kept: int
) -> tuple[Any, tuple[int, ...]]:
    """The array and its strides, in elements, as one batch axis and ``kept`` others of ``shape``.

    A copy only where no one stride goes through the leading axes.
    """
    strides = _strides(array, shape)
    step, held = 0, 1
    for n, stride in zip(shape[-kept - 1 :: -1], strides[-kept - 1 :: -1], strict=True):
        if n == 1:
            continue
        if held == 1:
            step = stride
        elif stride != step * held:
            copy = device.empty(shape, array.dtype)
            copy[...] = array
            return flat(device, copy, shape, kept)
        held *= n
    return array, (step, *strides[-kept:])


def _strides(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of ``array`` broadcast to ``shape``."""
    own = [
        0 if n == 1 else stride // array.itemsize
        for n, stride in zip(array.shape, array.strides, strict=True)
    ]
    return (0,) * (len(shape) - len(own)) + tuple(own)


def address(array: Any) -> int:
    """Where the first element lies."""
    interface = getattr(array, "__cuda_array_interface__", None) or array.__array_interface__
    return int(interface["data"][0])
