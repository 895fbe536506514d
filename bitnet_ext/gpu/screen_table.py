"""The int8 copy of a vocabulary table by which a device finds the largest logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.tables import ELEMENTS, DeviceTable

__all__ = ["SCREENED", "ScreenTable", "spans"]

SCREENED = ("f32", "f16", "bf16")  # an int8 table is as small as its screen would be

_MODULE = Module("screen_table.cu", [f"screen_pack<{ELEMENTS[dtype]}>" for dtype in SCREENED])

# As in screen.cuh and screen_table.cu.
_SPAN, _SPAN_BYTES = 64, 32  # elements, and bytes of each of the planes
_TILE_ROWS = 32  # the first plane ends with pairs of tiles of 16 rows
_BLOCK, _WARPS = (256,), 8


def spans(width: int) -> int:
    """Spans of 64 elements of a row."""
    return -(-width // _SPAN)


@dataclass(frozen=True)
class ScreenTable:
    """Two planes of 4 bits of each element of a table, and what their bounds need.

    Attributes:
        high, low: the planes, as screen.cuh has them.
        terms: float32 [3, V], each row's step, and its error of one plane and of both.
        vocab, width: of the table.
        top: 127.5 times the largest step, or 1 where that is more.
        finite: whether every value of the table is; else no bound is known.
    """

    high: Any
    low: Any
    terms: Any
    vocab: int
    width: int
    top: float
    finite: bool

    @classmethod
    def of(cls, device: Device, table: DeviceTable) -> ScreenTable:
        """Copy a table of one of the dtypes SCREENED; waits for the device."""
        vocab, stride = table.data.shape
        row_bytes = spans(table.width) * _SPAN_BYTES
        high = device.empty((-(-vocab // _TILE_ROWS) * _TILE_ROWS * row_bytes // 4,), np.uint32)
        low = device.empty((vocab * row_bytes // 4,), np.uint32)
        terms = device.empty((3, vocab), np.float32)
        numbers = [np.int64(stride), np.int32(table.width), np.int32(vocab)]
        device.launch(
            _MODULE,
            f"screen_pack<{ELEMENTS[table.dtype]}>",
            (-(-vocab // _WARPS),),
            _BLOCK,
            [table.data, *numbers, high, low, terms],
        )
        scales = device.to_host(terms[0])
        finite = bool(np.isfinite(scales).all())
        top = max(1.0, 127.5 * float(scales.max(initial=0))) if finite else np.inf
        return cls(high, low, terms, vocab, table.width, top, finite)

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.high.nbytes + self.low.nbytes + self.terms.nbytes)
