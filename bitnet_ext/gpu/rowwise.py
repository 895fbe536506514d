"""Norms of rows and rotary position embedding on a device, with the CPU's bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["norm", "rotary"]

_NORMS = {"rms": "norm_rows<kRms>", "layer": "norm_rows<kLayer>"}
_ROTARY = "rotate_heads"
_MODULE = Module("rowwise.cu", [*_NORMS.values(), _ROTARY])
_THREADS = 256
_STATIC = 2048  # bytes of shared memory that the kernels have besides


def norm(
    device: Device,
    rows: Any,
    weight: Any,
    bias: Any,
    eps: float,
    kind: Literal["rms", "layer"],
    out: Any,
    mean: Any = None,
    inv_std: Any = None,
) -> None:
    """The norm of float32 ``rows`` [R, N], contiguous rows, into ``out`` [R, N].

    ``weight`` and ``bias`` are float32 [N] or None, the statistics float32 [R] or None.
    """
    count, width = rows.shape
    stride = np.int64(rows.strides[0] // 4)
    shared = 16 * -(-width // 4)
    if shared > device.block_memory - _STATIC:
        shared = 0
    args = [rows, stride, np.int32(width), weight, bias, np.float32(eps), out, mean, inv_std]
    args.append(np.int32(shared > 0))
    device.launch(_MODULE, _NORMS[kind], (count,), (_THREADS,), args, shared)


def rotary(
    device: Device,
    x: Any,
    cos: Any,
    sin: Any,
    ids: Any,
    interleaved: bool,
    out: Any,
    *,
    first: int | None = None,
    backward: bool = False,
) -> None:
    """``x`` float32 [B, H, T, D] turned into ``out``, which may be ``x``; contiguous heads.

    Args:
        cos, sin: float32 [P, rotary_dim / 2].
        ids: int64 [B * T] rows of them; a token whose id is outside of them becomes NaN. None:
            each token has a row of its own, in order.
        first: the row of each sequence's first token, whose others follow; instead of ``ids``.
        backward: turn by the opposite angles.
    """
    batch, heads, tokens, size = x.shape
    strides = [np.int64(n // 4) for array in (x, out) for n in array.strides[:3]]
    positions, half = cos.shape
    rows = [ids, np.int64(first or 0), np.int64(tokens if first is None else 0)]
    device.launch(
        _MODULE,
        _ROTARY,
        (batch * tokens, heads),
        (_THREADS,),
        [
            *(x, *strides[:3], out, *strides[3:], cos, sin, *rows, np.int64(positions)),
            *map(np.int32, (tokens, size, half, interleaved, backward)),
        ],
    )
