"""The projection on the vocabulary: whole, or only its largest logits through a screen."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.memory.estimate import screen_bytes
from bitnet_ext.model.load import Table

__all__ = ["Head"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]

# Each row is screened by itself, one full product serves several: for four rows of a random table
# it takes 0.9 of the time (bench/bench_vocab.py).
_SCREENED_ROWS = 3


class Head:
    """A vocabulary table, its bias, and its screen once somebody asks for the largest logits.

    The screen is an int8 copy of the table with a proven bound (csrc/screen/screen.h): it names
    the few rows that can be among the k largest, and only those are projected as stored. The
    table is read whole where that costs no more or the bound does not hold, which
    ``DispatchMetrics`` counts as "vocab_screen_fallback" beside "vocab_screen".
    """

    def __init__(self, table: Table, bias: Float32 | None) -> None:
        self._table = table
        self._bias = bias
        rows, width = table.data.shape
        # An int8 table is as small as its screen would be.
        self._screen_bytes = 0 if table.dtype == "int8" else screen_bytes(rows, width)
        self._screen: _core.VocabScreen | None = None
        self._lock = threading.Lock()

    def project(self, hidden: Float32, out: Float32, places: Int32 | None = None) -> None:
        """Logits of every row: ``hidden`` float32 [M, E], ``out`` float32 [M, V].

        ``places`` int32 [M], ascending: the row of a longer ``out`` that each takes; the others are
        left alone.
        """
        table = self._table
        _core.project(hidden, table.data, table.dtype, table.scales, self._bias, out, places)

    def project_top(
        self,
        hidden: Float32,
        out: Float32,
        k: int,
        keep: Sequence[Int32],
        places: Int32 | None = None,
    ) -> None:
        """The logits that can be among the ``k`` largest, of the bits that :meth:`project` gives.

        ``keep`` names for each row ids (int32 [n]) whose logits are wanted too, and count for none
        of the k. The other logits may be -inf.
        """
        screen = self._find_screen() if len(hidden) <= _SCREENED_ROWS else None
        if screen is None:
            self.project(hidden, out, places)
            return
        table = self._table
        try:
            _core.project_top(
                hidden, table.data, table.dtype, self._bias, screen, k, list(keep), out, places
            )
        except MemoryError:  # no room for the bounds
            self.project(hidden, out, places)

    def release_screen(self) -> bool:
        """Give the screen's memory back; whether there was one."""
        with self._lock:
            found, self._screen = self._screen, None
        return found is not None

    def _find_screen(self) -> _core.VocabScreen | None:
        """The screen, made on first use; None for a small table, or no memory for one."""
        with self._lock:
            if self._screen is None and self._screen_bytes and _has_room(self._screen_bytes):
                try:
                    screen = _core.VocabScreen(self._table.data, self._table.dtype)
                except MemoryError:
                    return None
                if screen.finite:
                    self._screen = screen
                else:
                    self._screen_bytes = 0
            return self._screen


def _has_room(size: int) -> bool:
    """Whether the memory limit leaves as much again for the calls to come."""
    stats = _core.memory_stats()
    return not stats["limit"] or stats["limit"] - stats["current"] >= 2 * size
