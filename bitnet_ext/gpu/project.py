"""Projections on a device, on the vocabulary and others, with the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.tables import ELEMENTS, DeviceTable

__all__ = ["project"]

# As in project.cu.
_BLOCK = (128,)
_PAIRS, _SLICE, _SLOTS = 64, 64, 4

_COLUMNS = (1, 2, 4)  # rows of x in a tile
_MANY_BLOCK, _MANY_X, _MANY_TABLE = (256,), 32, 64
_FEW = 16  # rows of x for which many tiles of four do less than one of 32


def _each(dtype: str, columns: int) -> int:
    """Table rows of each thread: two for several rows of x, where shared memory holds as many."""
    return 1 if columns == 1 or dtype == "f32" else 2


def _kernel(dtype: str, columns: int) -> str:
    return f"project<{ELEMENTS[dtype]}, {_each(dtype, columns)}, {columns}>"


_MANY = {dtype: f"project_many<{element}>" for dtype, element in ELEMENTS.items()}
_MODULE = Module(
    "project.cu", [*(_kernel(dtype, n) for dtype in ELEMENTS for n in _COLUMNS), *_MANY.values()]
)


def project(
    device: Device,
    x: Any,
    table: DeviceTable,
    bias: Any,
    out: Any,
    active: Any = None,
    residual: Any = None,
) -> None:
    """``out[m][v] = x[m] . table[v]``, scaled where the table is int8, plus ``bias[v]``.

    A row's results have the same bits beside any number of other rows.

    Args:
        x: float32 [M, E].
        bias: float32 [V] or None.
        out: float32 [M, V].
        active: bool [M] on the device; rows of ``out`` that are not are left alone. None: all are.
        residual: float32 [M, V], added last, or None; may be ``out``.
    """
    rows, width = x.shape
    vocab, stride = table.data.shape
    pointers = [x, table.data, table.scales, bias, residual, active, out]
    args = [*pointers, np.int64(stride), *map(np.int32, (width, vocab, rows))]
    if rows > _FEW:
        tiles = -(-vocab // _MANY_TABLE) * -(-rows // _MANY_X)
        device.launch(_MODULE, _MANY[table.dtype], (tiles,), _MANY_BLOCK, args)
        return
    columns = next((n for n in _COLUMNS if n >= rows), max(_COLUMNS))
    tile = _PAIRS * _each(table.dtype, columns)
    size = table.data.dtype.itemsize
    slot = tile * (_SLICE * size + (16 if size == 1 else 32)) + columns * _SLICE * 4
    grid = -(-rows // columns), -(-vocab // tile)
    device.launch(_MODULE, _kernel(table.dtype, columns), grid, _BLOCK, args, _SLOTS * slot)
