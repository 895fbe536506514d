"""Ternary products of few rows, limited by the bytes of the weights."""

from __future__ import annotations

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product

__all__ = ["gemv"]

_MODULE = Module(
    "ternary_gemv.cu",
    [f"ternary_gemv<{groups}, {tiles}>" for groups in (1, 2) for tiles in (1, 2)],
)
_THREADS = 256


def gemv(device: Device, p: Product) -> None:
    """``p`` by reading the weights once for every 16 rows; rows in the plain layout."""
    groups = 1 if p.x.rows <= 8 else 2
    tiles = -(-p.weight.shape[0] // 16)
    # Two tiles in a block share its tokens; one leaves more blocks and more splits of k.
    shared = 2 if tiles >= 4 * device.processors else 1
    grid = (-(-tiles // shared), -(-p.x.rows // (8 * groups)))
    kernel = f"ternary_gemv<{groups}, {shared}>"
    device.launch(_MODULE, kernel, grid, (_THREADS,), p.args)
