"""Sums of outer products on a device, with the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["sum_products"]

_KERNEL = "sum_products"
_MODULE = Module("sum_products.cu", [_KERNEL])
_BLOCK, _OUTPUTS, _WIDTH = (256,), 64, 128  # as in sum_products.cu


def sum_products(device: Device, a: Any, b: Any, out: Any) -> None:
    """``out[n][k] += sum over m of a[m][n] b[m][k]``, m ascending.

    Args:
        a: float32 [M, N] of any strides.
        b: float32 [M, K], contiguous rows.
        out: float32 [N, K], contiguous rows.
    """
    terms, outputs = a.shape
    width = b.shape[1]
    strides = [np.int64(n // 4) for n in (*a.strides, b.strides[0], out.strides[0])]
    device.launch(
        _MODULE,
        _KERNEL,
        (-(-outputs // _OUTPUTS) * -(-width // _WIDTH),),
        _BLOCK,
        [
            *(a, *strides[:2], b, strides[2], out, strides[3]),
            *map(np.int32, (terms, outputs, width)),
        ],
    )
