"""Gradients of norms of rows on a device, with the CPU's bits."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["norm_backward"]

_KINDS = {"rms": "kRms", "layer": "kLayer"}
_ROWS = {kind: f"norm_backward_rows<{name}>" for kind, name in _KINDS.items()}
_COLUMNS = {kind: f"norm_backward_columns<{name}>" for kind, name in _KINDS.items()}
_ADD = "add_blocks"
_MODULE = Module("norm_backward.cu", [*_ROWS.values(), *_COLUMNS.values(), _ADD])
_THREADS, _BLOCK_ROWS = 256, 64  # as in norm_backward.cu


def norm_backward(
    device: Device,
    grad: Any,
    rows: Any,
    weight: Any,
    eps: float,
    kind: Literal["rms", "layer"],
    grad_x: Any,
    grad_weight: Any,
    grad_bias: Any,
) -> None:
    """The gradients of a norm of ``rows``.

    Args:
        grad, rows: float32 [R, N], contiguous rows.
        weight: float32 [N] or None.
        grad_x: float32 [R, N]; ``grad_weight`` and ``grad_bias``: float32 [N].
    """
    count, width = rows.shape
    strided = [n for array in (grad, rows) for n in (array, np.int64(array.strides[0] // 4))]
    moments = device.empty((count, 2), np.float32)
    device.launch(
        _MODULE,
        _ROWS[kind],
        (count,),
        (_THREADS,),
        [*strided, np.int32(width), weight, np.float32(eps), grad_x, moments],
    )
    blocks, columns = -(-count // _BLOCK_ROWS), -(-width // _THREADS)
    sums = device.empty((blocks, 2, width), np.float32)
    device.launch(
        _MODULE,
        _COLUMNS[kind],
        (blocks, columns),
        (_THREADS,),
        [*strided, moments, np.int64(count), np.int32(width), sums],
    )
    device.launch(
        _MODULE,
        _ADD,
        (columns, 2),
        (_THREADS,),
        [sums, np.int64(blocks), np.int32(width), grad_weight, grad_bias],
    )
