"""Ternary products on a device: which kernel, and the ops of ``bitnet_ext.ops`` on its arrays."""

from __future__ import annotations

import math
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from bitnet_ext._core import PackedTernary
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.product import Product
from bitnet_ext.gpu.quantise import Activations, arrange, norm_quantise
from bitnet_ext.gpu.ternary_gemm import gemm
from bitnet_ext.gpu.ternary_gemv import gemv
from bitnet_ext.gpu.ternary_wgmma import wgmma
from bitnet_ext.gpu.weight import DeviceTernary

__all__ = ["activations", "device_weight", "held", "linear", "matmul", "product"]

_GEMV_ROWS = 64  # beyond, a weight is worth keeping for more than 16 tokens
_HOPPER = 90

_weights: WeakKeyDictionary[PackedTernary, DeviceTernary] = WeakKeyDictionary()


def activations(device: Device, rows: int, k: int) -> Activations:
    """Room for rows in the layout that :func:`product` reads on this device."""
    return Activations.empty(device, rows, k, device.capability == _HOPPER and rows > _GEMV_ROWS)


def product(device: Device, p: Product) -> None:
    """Run ``p`` by the kernel for its rows and this device; every one gives the same bits."""
    if p.x.tiled:
        wgmma(device, p)
    elif p.x.rows <= _GEMV_ROWS:
        gemv(device, p)
    else:
        gemm(device, p)


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
    product(device, Product(x, device_weight(device, weight), out))
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
    norm_quantise(device, rows, quantised)
    out = device.empty((len(rows), n), np.float32)
    product(device, Product(quantised, device_weight(device, weight), out, bias))
    return out.reshape(*x.shape[:-1], n)
