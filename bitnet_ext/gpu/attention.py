"""Attention over arrays on a device, every option of the CPU's and its bits; linear in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["AttentionOptions", "attention"]

# By (vectors of 16 threads, columns of values that a block has).
_ATTENTION = {(n, w): f"attention<{n}, {w}>" for n in (1, 4) for w in (64, 128)}
_MERGE, _QUANTISE = "merge_parts", "quantise_heads"
_MODULE = Module("attention.cu", [*_ATTENTION.values(), _MERGE, _QUANTISE])

# As in flash.cuh and merge.cuh.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128
_CHUNK_KEYS, _LANES = 512, 16

_FAR = 1 << 40  # an extent without an end
_KINDS = {"float32": 0, "float16": 1, "bfloat16": 2, "int8": 3}
_MASKS = {"bool": 1, "float32": 2, "float16": 3, "bfloat16": 4}
_SCORES = {None: 0, "raw": 1, "softcap": 2, "mask": 3, "softmax": 4}


@dataclass(frozen=True)
class AttentionOptions:
    """What ``bx.attention`` takes beside q, k and v, checked; arrays on the device."""

    mask: Any  # [..., Hq, Tq, keys] up to broadcasting, contiguous last axis; None
    lengths: Any  # int64 [B]; None
    seeds: Any  # uint64 [B], or an int for all; None: no dropout
    causal: bool
    past: int
    left: int  # -1: unbounded
    right: int
    scale: float
    softcap: float
    dropout_p: float
    int8: bool
    scores: str | None


def attention(
    device: Device, q: Any, k: Any, v: Any, batch: tuple[int, ...], options: AttentionOptions
) -> tuple[Any, Any]:
    """(out ``[..., Hq, Tq, Dv]`` in the dtype of q, scores float32 ``[..., Hq, Tq, Tk]`` or None).

    Args:
        q, k, v: ``[..., H, T, D]`` on the device, contiguous last axes, float32, float16 or
            bfloat16; leading axes broadcast to ``batch``.
    """
    (heads, tq, dk), (kv_heads, tk, _), dv = q.shape[-3:], k.shape[-3:], v.shape[-1]
    out = device.empty((*batch, heads, tq, dv), q.dtype)
    scores = device.empty((*batch, heads, tq, tk), np.float32) if options.scores else None
    if out.size == 0 and (scores is None or scores.size == 0):
        return out, scores
    count, group = math.prod(batch), heads // kv_heads
    each = 1 if tq * group <= _GROUPS else 4
    wide = 64 if dv <= 64 else 128
    tile = _GROUPS * each
    tiles, slices = -(-tq * group // tile), max(1, -(-dv // wide))
    parts = 1 if scores is not None else _parts(device, tk, tiles * kv_heads * slices * count)
    states = None
    if parts > 1:
        states = device.empty((count, heads, tq, parts, 1 + _LANES + dv), np.float32)
    query, keys = ((_codes if options.int8 else _rows)(device, a, batch) for a in (q, k))
    values = _rows(device, v, batch)
    right = 0 if options.causal else options.right
    extents = [options.past, *(_FAR if n < 0 else n for n in (options.left, right))]
    device.launch(
        _MODULE,
        _ATTENTION[each, wide],
        (tiles * parts, kv_heads * slices, count),
        (_THREADS,),
        [
            *(*query[:5], *keys[:5], *values[:5], query[5], keys[5]),
            *(out, np.int32(_KINDS[out.dtype.name]), states, np.int32(parts)),
            *map(np.int32, (tq, tk, group, kv_heads, dk, dv)),
            options.lengths,
            *map(np.int64, extents),
            *map(np.float32, (options.scale, options.softcap)),
            *_mask(device, options.mask, (*batch, heads, tq), tk),
            *_dropout(options),
            *(scores, np.int32(_SCORES[options.scores])),
        ],
        4 * ((tile + _BLOCK_KEYS) * (_SLICE + 4) + tile * (_BLOCK_KEYS + 4)),
    )
    if parts > 1:
        device.launch(
            _MODULE,
            _MERGE,
            (count * heads * tq,),
            (-(-dv // 32) * 32,),
            [states, out, *map(np.int32, (_KINDS[out.dtype.name], parts, dv))],
        )
    return out, scores


def _parts(device: Device, keys: int, blocks: int) -> int:
    """Into how many the keys are split: where blocks are few, as many as there are chunks."""
    return max(1, -(-keys // _CHUNK_KEYS)) if 2 * blocks <= device.processors else 1


def _rows(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """A kernel's arguments for ``[..., H, T, D]`` with leading axes broadcast to ``batch``: data,
    kind, strides of batch, head and row; then its int8 scales, none."""
    array, strides = _flat(device, array, (*batch, *array.shape[-3:]), 3)
    return [array, np.int32(_KINDS[array.dtype.name]), *map(np.int64, strides[:-1]), None]


def _flat(
    device: Device, array: Any, shape: tuple[int, ...], kept: int
) -> tuple[Any, tuple[int, ...]]:
    """The array and its strides, in elements, as one batch axis and ``kept`` others of ``shape``.

    A copy only where no one stride goes through the leading axes.
    """
    strides = _strides(array, shape)
    step, held = 0, 1
    for n, stride in zip(shape[-kept - 1 :: -1], strides[-kept - 1 :: -1], strict=True):
        if n == 1:
            continue
        if held == 1:
            step = stride
        elif stride != step * held:
            copy = device.empty(shape, array.dtype)
            copy[...] = array
            return _flat(device, copy, shape, kept)
        held *= n
    return array, (step, *strides[-kept:])


def _strides(array: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides in elements of ``array`` broadcast to ``shape``."""
    own = [
        0 if n == 1 else stride // array.itemsize
        for n, stride in zip(array.shape, array.strides, strict=True)
    ]
    return (0,) * (len(shape) - len(own)) + tuple(own)


def _mask(device: Device, mask: Any, rows: tuple[int, ...], keys: int) -> list[Any]:
    """A kernel's seven arguments for a mask over ``rows`` [..., Hq, Tq]."""
    if mask is None:
        return [None, np.int32(0), *(np.int64(0),) * 4, np.int32(keys)]
    width = mask.shape[-1]
    mask, strides = _flat(device, mask, (*rows, width), 3)
    # A last axis of 1 is one value for all keys.
    reach = keys if width == 1 else width
    kind = np.int32(_MASKS[mask.dtype.name])
    return [mask, kind, *map(np.int64, strides), np.int32(reach)]


def _dropout(options: AttentionOptions) -> list[Any]:
    """A kernel's four arguments: seeds, the seed of all, what is dropped, the others' factor."""
    p, seeds = options.dropout_p, options.seeds
    seed = seeds if isinstance(seeds, int) else 0
    seeds = None if isinstance(seeds, int) else seeds
    dropped = np.rint(p * 2**24)
    return [seeds, np.uint64(seed), np.int32(dropped), np.float32(1.0 / (1.0 - p))]


def _codes(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """The arguments of :func:`_rows` for int8 codes of its vectors."""
    heads, tokens, width = array.shape[-3:]
    count = math.prod(batch)
    codes = device.empty((count, heads, tokens, width), np.int8)
    scales = device.empty((count, heads, tokens), np.float32)
    numbers = map(np.int32, (tokens, width))
    device.launch(
        _MODULE,
        _QUANTISE,
        (heads * tokens, count),
        (32,),
        [*_rows(device, array, batch)[:5], *numbers, codes, scales],
    )
    return [*_rows(device, codes, (count,))[:5], scales]
