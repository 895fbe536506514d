"""Causal masks filled on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import device
from bitnet_ext.gpu.compile import Module

__all__ = ["DeviceMasks"]

_KERNELS = {size: f"fill_mask<uint{8 * size}_t>" for size in (1, 2, 4)}
_MODULE = Module("mask.cu", list(_KERNELS.values()))

# As in mask.cu.
_BLOCK = (32, 8)
_STEP_BYTES = 32 * 4 * 16  # of a row, in one step of a block
_MOST_STEPS = 65535

# Bits of "attend" and "hide".
_VALUES = {
    np.dtype(np.float32): (np.uint32(0), np.uint32(0xFF800000)),
    np.dtype(np.float16): (np.uint16(0), np.uint16(0xFC00)),
    np.dtype(np.bool_): (np.uint8(1), np.uint8(0)),
}


class DeviceMasks:
    """Masks in arrays of the current CUDA device.

    Raises:
        DeviceUnavailableError: there is none.
    """

    def __init__(self) -> None:
        self._device = device.cuda_device()
        self.number = self._device.number

    def target(self, shape: tuple[int, ...], kind: np.dtype[Any], out: Any) -> Any:
        """``out`` if it is such an array on the device, or a new one."""
        if out is None:
            return self._device.empty(shape, kind)
        here = device.device_of(out) is self._device
        array = self._device.adopt(out) if here else None
        if array is None or array.shape != shape or array.dtype != kind:
            found = type(out).__name__ if array is None else f"{array.dtype} {array.shape}"
            raise InvalidShapeError(f"out: found {found}, wanted {kind} {shape} on the device")
        if array.size and (array.strides[-1] != kind.itemsize or array.strides[-2] % kind.itemsize):
            raise InvalidShapeError(f"out: found strides {array.strides}, wanted contiguous rows")
        return array

    def fill(self, out: Any, q_len: int, k_len: int, past: int, left: int, prefix: int) -> None:
        """As ``_core.mask_fill``: rows from ``q_len``, keys from ``k_len`` on are padding."""
        rows, width = out.shape
        size = out.itemsize
        numbers = (rows, width, out.strides[0] // size, q_len, k_len, past, left, prefix)
        # One word more than a row's bytes, for a row that does not begin on a boundary.
        steps = min(-(-(width * size + 16) // _STEP_BYTES), _MOST_STEPS)
        self._device.launch(
            _MODULE,
            _KERNELS[size],
            (-(-rows // _BLOCK[1]), steps if width else 0),
            _BLOCK,
            [out, *map(np.int64, numbers), *_VALUES[out.dtype]],
        )
