"""Ternary products of many rows on Hopper's matrix units."""

from __future__ import annotations

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product, SplitRoom, shares

__all__ = ["wgmma", "wgmma_room"]

_MODULE = Module("ternary_wgmma.cu", ["ternary_wgmma"], arch="sm_90a")
_OUTPUTS, _TOKENS = 256, 128
_THREADS = 384
_STAGES, _PART_TOKENS = 6, 64
_SHARED = _STAGES * (_TOKENS * 128 + 2 * 8) + 4 * _PART_TOKENS * (_OUTPUTS + 4)


def wgmma(device: Device, p: Product) -> None:
    """``p``, rows in the tiled layout, on a device of compute capability 9.0."""
    tiles = -(-p.weight.shape[0] // _OUTPUTS) * -(-p.x.rows // _TOKENS)
    grid = (shares(tiles, p.weight.blocks, p.split, device.processors),)
    device.launch(_MODULE, "ternary_wgmma", grid, (_THREADS,), p.split_args, _SHARED)


def wgmma_room(device: Device) -> SplitRoom:
    """Room for products of any number of rows."""
    return SplitRoom.empty(device, device.processors, _OUTPUTS * _TOKENS)
