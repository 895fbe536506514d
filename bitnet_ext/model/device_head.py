"""The projection on the vocabulary on a device: whole, or its largest logits through a screen."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.screen import ScreenedTop, most_largest
from bitnet_ext.gpu.screen_table import SCREENED, ScreenTable
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.memory.estimate import screen_bytes

__all__ = ["DeviceHead"]


class DeviceHead:
    """A vocabulary table on a device, its bias, and its screen once somebody asks for the largest
    logits: the counterpart of :class:`bitnet_ext.model.head.Head`.

    Who took a :class:`ScreenedTop` keeps the screen's memory until it is done.
    """

    def __init__(self, gpu: Device, table: DeviceTable, bias: Any) -> None:
        self._gpu, self._table, self._bias = gpu, table, bias
        rows, width = len(table.data), table.width
        screened = table.dtype in SCREENED
        self._screen_bytes = screen_bytes(rows, width, "cuda") if screened else 0
        self._screen: ScreenTable | None = None
        self._lock = threading.Lock()

    def project(self, hidden: Any, out: Any, active: Any = None) -> None:
        """Logits of every row; rows of ``out`` that are not ``active`` are left alone."""
        project(self._gpu, hidden, self._table, self._bias, out, active)

    def top(self, rows: int, k: int) -> ScreenedTop | None:
        """Finds the ``k`` largest logits of ``rows`` rows; None where the table is read whole:
        a small one, one that is not finite, a ``k`` of 0 or too large, or no memory."""
        vocab = len(self._table.data)
        if not 1 <= k <= most_largest(vocab):
            return None
        try:
            screen = self._find_screen()
            if screen is None:
                return None
            return ScreenedTop(self._gpu, self._table, self._bias, screen, rows, k)
        except MemoryError:
            return None

    def marks(self, keep: Sequence[npt.NDArray[np.int32]]) -> Any:
        """uint8 [rows, V] on the device, the ids of ``keep`` marked; None where there are none.

        Raises:
            InvalidShapeError: an id outside the vocabulary.
        """
        if not any(len(ids) for ids in keep):
            return None
        vocab = len(self._table.data)
        marks = np.zeros((len(keep), vocab), np.uint8)
        for row, ids in zip(marks, keep, strict=True):
            for bad in ids[(ids < 0) | (ids >= vocab)]:
                raise InvalidShapeError(f"keep: found id {bad}, wanted 0 to {vocab - 1}")
            row[ids] = 1
        return self._gpu.to_device(marks)

    def release_screen(self) -> bool:
        """Give the screen's memory back; whether there was one."""
        with self._lock:
            found, self._screen = self._screen, None
        return found is not None

    def _find_screen(self) -> ScreenTable | None:
        """The screen, made on first use; None for a small table, or no memory for one."""
        with self._lock:
            if self._screen is None and self._screen_bytes and self._has_room():
                screen = ScreenTable.of(self._gpu, self._table)
                if screen.finite:
                    self._screen = screen
                else:
                    self._screen_bytes = 0
            return self._screen

    def _has_room(self) -> bool:
        """Whether the memory limit leaves as much again for the calls to come."""
        used, _, limit = self._gpu.memory()
        return not limit or limit - used >= 2 * self._screen_bytes
