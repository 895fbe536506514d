"""Ternary matrices on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext._core import PackedTernary
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["DeviceTernary"]

_MODULE = Module("weight.cu", ["pack", "unpack"])
_THREADS = 256
_PANEL = 64
_BLOCK_K = 128
_MAX_K = 1 << 18  # a warp's sums fit int32 (ternary_gemv.cu)


class DeviceTernary:
    """A ternary matrix [n, k] in the device's layout (ternary.cuh): 2 bits a weight.

    Attributes:
        words: uint32 [panels, blocks, 4, 32, 4].
        scale: float32 [64 panels] in the layout's order.
        row_scale: as the host's matrix has it: float, or float32 [n].
        gated: gate and up projections, n / 2 rows each, whose rows stand side by side.
    """

    def __init__(self, device: Device, weight: PackedTernary, *, gated: bool = False) -> None:
        """Bring ``weight`` to ``device``.

        Raises:
            InvalidShapeError: ``weight`` is too wide, or gated with an odd number of rows.
        """
        n, k = self.shape = weight.shape
        if k > _MAX_K:
            raise InvalidShapeError(f"weight: found {k} columns, wanted at most {_MAX_K}")
        if gated and n % 2:
            raise InvalidShapeError(f"weight: found {n} rows of gate and up, wanted an even number")
        self.device = device
        self.divide = weight.divide
        self.gated = gated
        self.panels, self.blocks = -(-n // _PANEL), -(-k // _BLOCK_K)
        self.words = device.empty((self.panels, self.blocks, 4, 32, 4), np.uint32)
        self._launch("pack", self.words, device.to_device(weight.unpack()))
        self.row_scale = weight.scale
        self.scale = self.in_order(np.broadcast_to(np.float32(self.row_scale), (n,)))

    def in_order(self, values: Any) -> Any:
        """float32 [n] of the rows as the layout orders them, padded with zeros."""
        host = np.zeros(self.panels * _PANEL, np.float32)
        rows = np.arange(self.shape[0])
        if self.gated:
            pair, up = rows % (len(rows) // 2 or 1), rows >= len(rows) // 2
            rows = pair // 8 * 16 + pair % 8 + 8 * up
        host[rows] = values
        return self.device.to_device(host)

    def unpack(self) -> Any:
        """int8 [n, k] of -1, 0 and 1, on the device."""
        matrix = self.device.empty(self.shape, np.int8)
        self._launch("unpack", matrix, self.words)
        return matrix

    def packed(self) -> PackedTernary:
        """The matrix on the host again."""
        codes = self.device.to_host(self.unpack())
        if not self.divide:
            return PackedTernary.pack(codes, self.row_scale)
        scale = np.broadcast_to(np.float32(self.row_scale), (len(codes),))
        starts = [0, *(np.flatnonzero(np.diff(scale)) + 1).tolist()]  # of rows with one scale
        parts: list[Any] = [
            ("codes", "codes", codes[i:j], j - i, codes.shape[1], float(scale[i]), True, None)
            for i, j in zip(starts, [*starts[1:], len(codes)], strict=True)
        ]
        return PackedTernary.from_sources(parts, "2")

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.words.nbytes + self.scale.nbytes)

    def _launch(self, kernel: str, *arrays: Any) -> None:
        n, k = self.shape
        total = self.words.size
        sizes = (np.int32(n), np.int32(k), np.int32(self.blocks), np.int64(total))
        grid = (-(-total // _THREADS),)
        args = [*arrays, *sizes, np.int32(self.gated)]
        self.device.launch(_MODULE, kernel, grid, (_THREADS,), args)
