"""Ternary products on a device: which kernel, and the ops of ``bitnet_ext.ops`` on its arrays."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from bitnet_ext._core import PackedTernary
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product, SplitRoom
from bitnet_ext.gpu.quantise import Activations, NormRows, arrange, norm_quantise
from bitnet_ext.gpu.ternary_gemm import gemm, gemm_room
from bitnet_ext.gpu.ternary_gemv import gemv, norm_gemv, norms_in_front
from bitnet_ext.gpu.ternary_wgmma import wgmma, wgmma_room
from bitnet_ext.gpu.weight import DeviceTernary

__all__ = [
    "activations",
    "device_weight",
    "held",
    "linear",
    "matmul",
    "norm_product",
    "product",
    "split_room",
]

_GEMV_ROWS = 16  # beyond, a weight is worth keeping for more tokens, and tokens for more weights
_TILED_ROWS = 64  # beyond, Hopper's tiles of 128 tokens
_HOPPER = 90

_weights: WeakKeyDictionary[PackedTernary, DeviceTernary] = WeakKeyDictionary()


def activations(device: Device, rows: int, k: int) -> Activations:
    """Room for rows in the layout that :func:`product` reads on this device."""
    return Activations.empty(device, rows, k, _tiled(device, rows))


def split_room(device: Device, rows: int) -> SplitRoom | None:
    """Scratch for :func:`product` of so many rows; None where there is no use for any."""
    if rows <= _GEMV_ROWS:
        return None
    return wgmma_room(device) if _tiled(device, rows) else gemm_room(device, rows)


def _tiled(device: Device, rows: int) -> bool:
    return device.capability == _HOPPER and rows > _TILED_ROWS


def product(device: Device, p: Product) -> None:
    """Run ``p`` by the kernel for its rows and this device; every one gives the same bits."""
    if p.x.tiled:
        wgmma(device, p)
    elif p.x.rows <= _GEMV_ROWS:
        gemv(device, p)
    else:
        gemm(device, p)


def norm_product(device: Device, x: NormRows, p: Product) -> None:
    """Run ``p`` on ``x``, normed and quantised: in one launch, or by way of ``p.x``."""
    rows, k = x.rows.shape
    if norms_in_front(device, p.weight.shape[0], k, rows):
        norm_gemv(device, x, p)
    else:
        norm_quantise(device, x, p.x)
        product(device, p)


def device_weight(device: Device, weight: PackedTernary) -> DeviceTernary:
    """``weight`` on ``device``, brought there on the first call and kept while it lives."""
    found = _weights.get(weight)
    if found is None or found.device is not device:
        found = _weights[weight] = DeviceTernary(device, weight)
    return found


def held(weight: PackedTernary) -> bool:
    """Whether ``weight`` has been brought to a device."""
    return weight in _weights


def matmul(device: Device, q: Any, weight: PackedTernary) -> Any:
    """:func:`bitnet_ext.ternary_matmul` on arrays of ``device``."""
    n, k = weight.shape
    if q.dtype != np.int8 or q.ndim != 2 or q.shape[1] != k:
        raise InvalidShapeError(f"q: found {q.dtype} {q.shape}, wanted int8 [M, {k}]")
    x = activations(device, len(q), k)
    arrange(device, device.rows_contiguous(q), x)
    out = device.empty((len(q), n), np.int32)
    split = split_room(device, len(q))
    product(device, Product(x, device_weight(device, weight), out, split=split))
    return out


def linear(device: Device, x: Any, weight: PackedTernary, bias: Any) -> Any:
    """:func:`bitnet_ext.ternary_linear` on arrays of ``device``."""
    n, k = weight.shape
    if x.dtype != np.float32 or x.ndim == 0 or x.shape[-1] != k:
        raise InvalidShapeError(f"x: found {x.dtype} {x.shape}, wanted float32 [..., {k}]")
    if bias is not None:
        if not device.owns(bias):
            bias = device.to_device(np.ascontiguousarray(bias, np.float32))
        if bias.dtype != np.float32 or bias.shape != (n,):
            raise InvalidShapeError(f"bias: found {bias.dtype} {bias.shape}, wanted float32 [{n}]")
        bias = device.rows_contiguous(bias)
    rows = device.rows_contiguous(x.reshape(math.prod(x.shape[:-1]), k))
    quantised = activations(device, len(rows), k)
    out = device.empty((len(rows), n), np.float32)
    split = split_room(device, len(rows))
    p = Product(quantised, device_weight(device, weight), out, bias, split=split)
    norm_product(device, NormRows(rows), p)
    return out.reshape(*x.shape[:-1], n)
