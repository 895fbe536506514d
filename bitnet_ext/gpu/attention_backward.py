"""Gradients of attention over arrays on a device, with the CPU's bits; linear in memory."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitnet_ext.gpu.attention import AttentionOptions, Take, attention, fresh, reach, weighing
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import vectors

__all__ = ["attention_backward"]

# By (whether by keys, vectors or keys of 16 threads, columns of sums that a block has).
_BACKWARD = {
    (by_keys, n, w): f"attention_backward<{str(by_keys).lower()}, {n}, {w}>"
    for by_keys in (False, True)
    for n in (1, 4)
    for w in (64, 128)
}
_PRODUCTS = "row_products"
_MODULE = Module("attention_backward.cu", [*_BACKWARD.values(), _PRODUCTS])

# As in flash.cuh and attention_backward.cu.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128


def attention_backward(
    device: Device,
    d_out: Any,
    q: Any,
    k: Any,
    v: Any,
    batch: tuple[int, ...],
    options: AttentionOptions,
    grads: tuple[Any, Any, Any],
    out: Any = None,
    take: Take | None = None,
) -> None:
    """The gradient of q into dq, of k and v added to dk and dv.

    Args:
        d_out: ``[..., Hq, Tq, Dv]``, all leading axes.
        q, k, v, batch, options: as ``gpu.attention.attention`` takes them; precision "f32".
        grads: (dq, dk, dv), float32 with all leading axes, through which one stride goes, and
            contiguous last ones.
        out: likewise, for the result of attention, which is computed again; None: an intermediate.
        take: makes intermediates; default new arrays.
    """
    (heads, tq, dk), (kv_heads, tk, _), dv = q.shape[-3:], k.shape[-3:], v.shape[-1]
    count, rows = math.prod(batch), math.prod(batch) * heads * tq
    if rows == 0:
        return
    if dv == 0:  # nothing depends on the weights
        grads[0][...] = 0
        return
    take = take or fresh(device)
    if out is None:
        out = take("attended", (*batch, heads, tq, dv))
    stats = take("stats", (rows, 4))
    attention(device, q, k, v, batch, options, out, take, stats)
    operands = [vectors(device, a, batch)[:5] for a in (q, k, v, d_out)]
    dq_to, dk_to, dv_to, result = (_sums(device, a, batch) for a in (*grads, out))
    device.launch(
        _MODULE,
        _PRODUCTS,
        (-(-rows // _GROUPS),),
        (_THREADS,),
        [*operands[3], *result, stats, np.int64(rows), *map(np.int32, (heads, tq, dv))],
    )
    group = heads // kv_heads
    wide = 64 if max(dk, dv) <= 64 else 128
    slices = -(-max(dk, dv) // wide)
    tail = [
        stats,
        *map(np.int32, (tq, tk, group, kv_heads, dk, dv)),
        *reach(options),
        *weighing(device, options, (*batch, heads, tq), tk),
    ]
    no_sums = [None, *(np.int64(0),) * 3]
    for by_keys, total, sums in (
        (False, tq * group, [*dq_to, *no_sums]),
        (True, tk, [*dk_to, *dv_to]),
    ):
        each = 1 if total <= _GROUPS else 4
        own = _GROUPS * each
        columns = slices if by_keys else -(-dk // wide)
        device.launch(
            _MODULE,
            _BACKWARD[by_keys, each, wide],
            (count * -(-total // own), kv_heads * columns),
            (_THREADS,),
            [*(n for operand in operands for n in operand), *sums, *tail],
            4 * ((2 * own + _BLOCK_KEYS) * (_SLICE + 4) + 2 * own * (_BLOCK_KEYS + 4)),
        )


def _sums(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """A kernel's arguments for float32 that it writes: data, strides of batch, head and row."""
    data, _, *strides = vectors(device, array, batch)[:5]
    return [data, *strides]
