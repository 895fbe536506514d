"""Ternary products of many rows on the matrix units of any device."""

from __future__ import annotations

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product

__all__ = ["gemm"]

_MODULE = Module("ternary_gemm.cu", ["ternary_gemm"])
_OUTPUTS, _TOKENS = 128, 64
_THREADS = 128
_SHARED = 4 * _TOKENS * 128  # four stages; the sums of 32 tokens fit them


def gemm(device: Device, p: Product) -> None:
    """``p``, rows in the plain layout."""
    grid = (-(-p.weight.shape[0] // _OUTPUTS), -(-p.x.rows // _TOKENS))
    device.launch(_MODULE, "ternary_gemm", grid, (_THREADS,), p.args, _SHARED)
