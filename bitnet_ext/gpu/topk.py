"""The largest entries of rows on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["BINS", "BLOCK", "CHUNK", "DIGITS", "MOST_LARGEST", "STATE_BYTES", "TopK", "chunks"]

_MODULE = Module("topk.cu", ["topk_digit", "topk_collect"])

# As in select.cuh.
BLOCK = (256,)
CHUNK = 1024
BINS = 2048
DIGITS = 6
STATE_BYTES = 64

MOST_LARGEST = 4096  # keys that a block sorts in shared memory


def chunks(count: int) -> int:
    """Blocks that share a row of ``count`` entries."""
    return -(-count // CHUNK)


class TopK:
    """Finds the k largest of each of ``rows`` rows of ``count``; its buffers are made once.

    Args:
        k: 1 to the smaller of ``count`` and MOST_LARGEST.
    """

    def __init__(self, device: Device, rows: int, count: int, k: int) -> None:
        self._device = device
        self._shape = rows, count
        self._k = k
        self._states = device.to_device(np.zeros((rows, STATE_BYTES), np.uint8))
        self._histograms = device.to_device(np.zeros((rows, BINS), np.uint64))
        self._keys = device.empty((rows, k), np.uint64)
        self.ids = device.empty((rows, k), np.int32)
        self.values = device.empty((rows, k), np.float32)

    def find(self, values: Any) -> None:
        """Fill ``ids`` and ``values`` [rows, k], largest first; ties by id, NaN last.

        Args:
            values: float32 [rows, count].
        """
        rows, count = self._shape
        grid = chunks(count), rows
        common = [values, np.int32(count), np.int32(self._k)]
        for digit in range(DIGITS):
            self._device.launch(
                _MODULE,
                "topk_digit",
                grid,
                BLOCK,
                [*common, np.int32(digit), self._states, self._histograms],
            )
        size = 1 << (self._k - 1).bit_length()
        self._device.launch(
            _MODULE,
            "topk_collect",
            grid,
            BLOCK,
            [*common, np.int32(size), self._states, self._keys, self.ids, self.values],
            8 * size,
        )
