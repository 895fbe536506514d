"""Ternary products of many rows on Hopper's matrix units."""

from __future__ import annotations

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product

__all__ = ["wgmma"]

_MODULE = Module("ternary_wgmma.cu", ["ternary_wgmma"], arch="sm_90a")
_OUTPUTS, _TOKENS = 256, 128
_THREADS = 384
_STAGES = 6
_SHARED = _STAGES * (_TOKENS * 128 + 2 * 8)


def wgmma(device: Device, p: Product) -> None:
    """``p``, rows in the tiled layout, on a device of compute capability 9.0."""
    grid = (-(-p.weight.shape[0] // _OUTPUTS), -(-p.x.rows // _TOKENS))
    device.launch(_MODULE, "ternary_wgmma", grid, (_THREADS,), p.args, _SHARED)
