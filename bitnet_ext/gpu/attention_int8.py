"""Attention over arrays on a device: int8 scores, half-precision values, on its matrix units."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitnet_ext.gpu.attention_codes import codes
from bitnet_ext.gpu.attention_half import (
    BLOCK_KEYS,
    KINDS,
    WIDEST,
    instances,
    launch,
    whole_words,
)
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import vectors

__all__ = ["attention", "fits"]

_PRECISIONS = {kind: precision for precision, kind in KINDS.items()}  # of values
_ATTENTION = instances("attention_int8")
_MERGE = "merge_parts<HalfPart>"
_MODULE = Module("attention_int8.cu", [*_ATTENTION.values(), _MERGE])


def fits(precision: str, values: np.dtype[Any], scale: float, widest: int) -> bool:
    """Whether these kernels are for that precision, type of v, scale and largest of dk and dv."""
    return precision == "int8" and values.name in _PRECISIONS and scale > 0 and widest <= WIDEST


def attention(
    device: Device, q: Any, k: Any, v: Any, batch: tuple[int, ...], place: list[Any], out: Any
) -> None:
    """``out = softmax(scale q k^T) v`` with q and k as int8 codes; as ``attention_half``'s."""
    dk, dv = q.shape[-1], v.shape[-1]
    wide = 64 if max(dk, dv) <= 64 else 128
    queries, keys = (codes(device, a, batch) for a in (q, k))
    values, precision = vectors(device, v, batch)[:5], _PRECISIONS[v.dtype.name]
    padded = np.int32(keys[0].shape[-1])
    launch(
        device,
        (_MODULE, _ATTENTION[precision, wide, whole_words(values, precision, dv)], _MERGE),
        [*queries, *keys, padded, *values],
        (math.prod(batch), q.shape, k.shape),
        (dv,),
        place,
        out,
        BLOCK_KEYS * (wide + 4 + 2 * wide),
    )
