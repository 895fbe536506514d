"""Ternary products of many rows on the matrix units of any device."""

from __future__ import annotations

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product, SplitRoom, shares

__all__ = ["gemm", "gemm_room"]

_TOKENS = (32, 64)
_MODULE = Module("ternary_gemm.cu", [f"ternary_gemm<{tokens}>" for tokens in _TOKENS])
_OUTPUTS, _THREADS, _STAGES, _BLOCK_K = 128, 128, 4, 128
_RESIDENT = 3  # blocks that a multiprocessor holds
_SUMS = 4 * 32 * (_OUTPUTS + 4)  # bytes of 32 tokens' sums


def gemm(device: Device, p: Product) -> None:
    """``p``, rows in the plain layout."""
    tokens = _TOKENS[0] if p.x.rows <= _TOKENS[0] else _TOKENS[1]
    tiles = -(-p.weight.shape[0] // _OUTPUTS) * -(-p.x.rows // tokens)
    grid = (shares(tiles, p.weight.blocks, p.split, _RESIDENT * device.processors),)
    shared = max(_STAGES * tokens * _BLOCK_K, _SUMS)
    kernel = f"ternary_gemm<{tokens}>"
    device.launch(_MODULE, kernel, grid, (_THREADS,), p.split_args, shared)


def gemm_room(device: Device, rows: int) -> SplitRoom:
    """Room for products of up to ``rows`` rows."""
    tokens = _TOKENS[0] if rows <= _TOKENS[0] else _TOKENS[1]
    return SplitRoom.empty(device, _RESIDENT * device.processors, _OUTPUTS * tokens)
