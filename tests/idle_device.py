"""A CUDA device that runs no kernel: it counts the bytes of arrays and notes launches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_emulator.arrays import EmulatedArray
from cuda_emulator.emulator import EmulatedDevice

from bitnet_ext.gpu.compile import Module


class IdleDevice(EmulatedDevice):
    """Its arrays are zeros for good, whatever is copied there: memory that nobody touches.

    Attributes:
        noted: (module, kernel, grid, block, bytes of dynamic shared memory) of each launch.
        multiple: of bytes that an array takes.
    """

    def __init__(self, capability: int, processors: int, multiple: int = 1) -> None:
        super().__init__(capability, processors)
        self.multiple = multiple
        self.noted: list[tuple[Module, str, tuple[int, ...], tuple[int, ...], int]] = []

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> EmulatedArray:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        taken = -(-size // self.multiple) * self.multiple
        self._count(taken)
        array = np.zeros(size, np.uint8).view(EmulatedArray)
        self._watch(array, taken)
        return array.view(dtype).reshape(shape)

    def to_device(self, array: npt.ArrayLike) -> EmulatedArray:
        host = np.asarray(array)
        return self.empty(host.shape, host.dtype)

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        self._check_geometry(kernel, grid, block, shared)
        self.noted.append((module, kernel, tuple(grid), tuple(block), shared))
