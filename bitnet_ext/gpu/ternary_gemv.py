"""Ternary products of few rows, limited by the bytes of the weights."""

from __future__ import annotations

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product
from bitnet_ext.gpu.quantise import BLOCK_K, KINDS, MOST_ROWS, NormRows

__all__ = ["gemv", "norm_gemv", "norms_in_front"]

_MODULE = Module(
    "ternary_gemv.cu",
    [f"ternary_gemv<{groups}, {tiles}>" for groups in (1, 2) for tiles in (1, 2)]
    + [f"norm_gemv<{kind}, {tiles}>" for kind in range(len(KINDS)) for tiles in (1, 2, 4)],
)
_THREADS = 256

_STATIC = 8 << 10  # bytes of shared memory that the kernels have besides
# What a launch of its own for the norm costs, 2.5 us, is as long as the second-level cache takes
# for so many bytes of rows (5 TB/s).
_LAUNCH_BYTES = 12 << 20


def gemv(device: Device, p: Product) -> None:
    """``p`` by reading the weights once for every 16 rows; rows in the plain layout."""
    groups = 1 if p.x.rows <= 8 else 2
    tiles = -(-p.weight.shape[0] // 16)
    # Two tiles in a block share its tokens; one leaves more blocks and more splits of k.
    shared = 2 if tiles >= 4 * device.processors else 1
    grid = (-(-tiles // shared), -(-p.x.rows // (8 * groups)))
    kernel = f"ternary_gemv<{groups}, {shared}>"
    device.launch(_MODULE, kernel, grid, (_THREADS,), p.args)


def norms_in_front(device: Device, n: int, k: int, rows: int) -> bool:
    """Whether :func:`norm_gemv` of rows [rows, k] takes less time than a norm before a product."""
    _, grid = _norm_geometry(device, n)
    return (
        rows <= MOST_ROWS
        and 4 * k * rows * grid <= _LAUNCH_BYTES
        and _norm_bytes(rows, k) + _STATIC <= device.block_memory
    )


def norm_gemv(device: Device, x: NormRows, p: Product) -> None:
    """``p`` of the rows of ``x``, normed and quantised in each block; ``p.x`` is left alone."""
    rows, k = x.rows.shape
    tiles, grid = _norm_geometry(device, p.weight.shape[0])
    device.launch(
        _MODULE,
        f"norm_gemv<{KINDS.index(x.kind)}, {tiles}>",
        (grid if rows else 0,),
        (_THREADS,),
        [
            *(p.weight.words, *x.args, np.int32(p.weight.blocks)),
            *p.epilogue(None, None),
        ],
        _norm_bytes(rows, k),
    )


def _norm_geometry(device: Device, n: int) -> tuple[int, int]:
    """Tiles of a block, and blocks: few, as each norms the rows, but one for every processor."""
    tiles = -(-n // 16)
    each = next((t for t in (4, 2) if tiles >= t * device.processors), 1)
    return each, -(-tiles // each)


def _norm_bytes(rows: int, k: int) -> int:
    """Shared memory: the rows and the norm's weight, and the rows' codes (ternary_gemv.cu)."""
    return 16 * -(-k // 4) * (rows + 1) + rows * (-(-k // BLOCK_K) * BLOCK_K + 16)
