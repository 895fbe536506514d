"""The largest logits of rows on a device, through the screen of a vocabulary table."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.screen_table import SCREENED, ScreenTable, spans
from bitnet_ext.gpu.tables import ELEMENTS, DeviceTable
from bitnet_ext.gpu.topk import BLOCK, chunks

__all__ = ["ScreenedTop", "most_largest"]

# (groups of four rows of x, tiles of 16 rows of the table) of a warp.
_SHAPES = {1: 1, 2: 1, 4: 2, 8: 2}

_MODULE = Module(
    "screen.cu",
    [
        "screen_query",
        *(f"screen_bound<{columns}, {tiles}>" for columns, tiles in _SHAPES.items()),
        *(f"screen_list<{plane}>" for plane in range(2)),
        "screen_refine",
        *(f"screen_exact<{ELEMENTS[dtype]}>" for dtype in SCREENED),
    ],
)

# As in screen.cuh and screen.cu.
_ROW_BYTES, _SPAN, _TILE_ROWS, _GROUP_ROWS, _WARPS, _HELD_BYTES = 64, 64, 16, 64, 8, 2048

_MOST_ROWS = 4  # a full product costs less than this part of its rows here and there
_BLOCKS_EACH = 8  # of a multiprocessor, for what is listed


def most_largest(vocab: int) -> int:
    """The most of the largest logits that a screen finds."""
    return -(-vocab // _GROUP_ROWS)


class ScreenedTop:
    """Logits of ``rows`` rows that can be among the k largest of each; its buffers are made once.

    The steps are launches whose size does not depend on what they find, so that they can be
    captured: see screen.cu.

    Args:
        table, bias: of the projection; bias float32 [V] or None.
        screen: of the table, and finite.
        k: 1 to ``most_largest(V)``.
    """

    def __init__(
        self,
        device: Device,
        table: DeviceTable,
        bias: Any,
        screen: ScreenTable,
        rows: int,
        k: int,
    ) -> None:
        vocab = screen.vocab
        self._device, self._table, self._bias, self._screen = device, table, bias, screen
        self._rows, self._k = rows, k
        self._room = -(-vocab // _MOST_ROWS)
        self._groups = most_largest(vocab)
        self._states = device.empty((rows, _ROW_BYTES), np.uint8)
        self._whole = device.empty((rows,), np.uint8)
        self._pieces = device.empty((2 * rows, spans(screen.width) * _SPAN), np.int8)
        self._largest = device.empty((rows, 2, self._groups), np.uint32)
        self._maybe = device.empty((rows, vocab), np.int32)
        self._list = device.empty((rows, self._room), np.int32)

    def project(self, x: Any, out: Any, active: Any = None, seen: Any = None) -> None:
        """Logits of the bits that :func:`project` gives, -inf for most that are not among the k.

        Every logit that equals the k-th largest is there too.

        Args:
            x: float32 [rows, E].
            out: float32 [rows, V].
            active: bool [rows]; rows of ``out`` that are not are left alone. None: all are.
            seen: uint8 [rows, V], marks of logits that are wanted too and count for none of the k;
                or None.
        """
        s = self._screen
        vocab, span_count = np.int32(s.vocab), np.int32(spans(s.width))
        numbers = [np.float64(s.top), self._states, self._whole, self._pieces, self._largest]
        self._launch(
            "screen_query",
            (self._rows,),
            [x, active, *numbers, np.int32(s.width), np.int32(self._groups)],
        )
        columns = next((n for n in _SHAPES if 4 * n >= self._rows), max(_SHAPES))
        tiles = _SHAPES[columns]
        self._launch(
            f"screen_bound<{columns}, {tiles}>",
            (-(-self._rows // (4 * columns)), -(-s.vocab // (_TILE_ROWS * tiles * _WARPS))),
            [
                *(s.high, s.terms, self._bias, seen, self._pieces, self._states, self._largest),
                *(out, span_count, vocab, np.int32(self._rows)),
            ],
        )
        self._select(0, None, self._maybe, s.vocab, out, seen)
        some = max(1, _BLOCKS_EACH * self._device.processors // self._rows), self._rows
        self._launch(
            "screen_refine",
            some,
            [
                *(s.low, s.terms, self._bias, seen, self._pieces, self._maybe, self._states),
                *(self._largest, out, span_count, vocab),
            ],
        )
        self._select(1, self._maybe, self._list, self._room, out, seen)
        self._launch(
            f"screen_exact<{ELEMENTS[self._table.dtype]}>",
            some,
            [
                *(self._table.data, np.int64(self._table.data.shape[1]), x, self._bias),
                *(self._list, self._states, self._whole, out),
                *(np.int32(s.width), np.int32(self._room), vocab),
            ],
            2 * _WARPS * _HELD_BYTES,
        )
        project(self._device, x, self._table, self._bias, out, self._whole)

    def _select(self, plane: int, listed: Any, found: Any, room: int, out: Any, seen: Any) -> None:
        s = self._screen
        self._launch(
            f"screen_list<{plane}>",
            (chunks(s.vocab), self._rows),
            [
                *(s.terms, self._bias, seen, self._largest, self._states, self._whole),
                *(listed, found, out, np.int32(self._k), np.int32(room), np.int32(s.vocab)),
            ],
        )

    def _launch(self, kernel: str, grid: tuple[int, ...], args: list[Any], shared: int = 0) -> None:
        self._device.launch(_MODULE, kernel, grid, BLOCK, args, shared)
