"""Queries and keys of attention as int8 codes on a device, the CPU's."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import vectors

__all__ = ["codes"]

_MODULE = Module("attention_codes.cu", ["quantise_heads"])

_WORD = 16  # bytes that are copied at a time
_WARPS = 8  # of a block, as in attention_codes.cu


def codes(device: Device, array: Any, batch: tuple[int, ...]) -> tuple[Any, Any]:
    """(int8 ``[N, H, T, D]``, float32 ``[N, H, T]``): code times scale is nearly the element.

    Rows of both are padded to whole words of 16 bytes, the codes' with zeros.

    Args:
        array: ``[..., H, T, D]``, leading axes broadcast to ``batch``, N in all.
    """
    heads, tokens, width = array.shape[-3:]
    count = math.prod(batch)
    padded, scale_row = -(-width // _WORD) * _WORD, -(-tokens // (_WORD // 4)) * (_WORD // 4)
    found = device.empty((count, heads, tokens, padded), np.int8)
    scales = device.empty((count, heads, scale_row), np.float32)
    sizes = [*map(np.int32, (heads, tokens, width)), found, scales]
    device.launch(
        _MODULE,
        "quantise_heads",
        (count * -(-heads * tokens // _WARPS),),
        (32 * _WARPS,),
        [*vectors(device, array, batch)[:5], *sizes, np.int32(padded)],
    )
    return found, scales
