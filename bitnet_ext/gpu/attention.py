"""Attention over arrays on a device, every option of the CPU's and its bits; linear in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.gpu import attention_half, attention_int8
from bitnet_ext.gpu.attention_codes import codes
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import flat, vectors

__all__ = ["AttentionOptions", "Take", "attention", "fresh", "reach", "weighing"]

Take = Callable[[str, tuple[int, ...]], Any]  # makes float32 intermediates by their names

# By (vectors of 16 threads, columns of values that a block has).
_ATTENTION = {(n, w): f"attention<{n}, {w}>" for n in (1, 4) for w in (64, 128)}
_MERGE = "merge_parts<ExactPart>"
_MODULE = Module("attention.cu", [*_ATTENTION.values(), _MERGE])

# As in flash.cuh and merge.cuh.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128
_CHUNK_KEYS, _LANES = 512, 16

_FAR = 1 << 40  # an extent without an end
_MASKS = {"bool": 1, "float32": 2, "float16": 3, "bfloat16": 4}
_SCORES = {None: 0, "raw": 1, "softcap": 2, "mask": 3, "softmax": 4}


@dataclass(frozen=True)
class AttentionOptions:
    """What ``bx.attention`` takes beside q, k and v, checked; arrays on the device."""

    mask: Any  # [..., Hq, Tq, keys] up to broadcasting, contiguous last axis; None
    lengths: Any  # int64 [B]; None
    seeds: Any  # uint64 [B], an int for all, a range of B, taken mod 2^64; None: no dropout
    causal: bool
    past: int
    left: int  # -1: unbounded
    right: int
    scale: float
    softcap: float
    dropout_p: float
    precision: str  # "f32", "int8", "f16" or "bf16"
    scores: str | None


def attention(
    device: Device,
    q: Any,
    k: Any,
    v: Any,
    batch: tuple[int, ...],
    options: AttentionOptions,
    out: Any = None,
    take: Take | None = None,
    stats: Any = None,
) -> tuple[Any, Any]:
    """(out ``[..., Hq, Tq, Dv]`` in the dtype of q, scores float32 ``[..., Hq, Tq, Tk]`` or None).

    Args:
        q, k, v: ``[..., H, T, D]`` on the device, contiguous last axes, float32, float16 or
            bfloat16; leading axes broadcast to ``batch``.
        out: where to, contiguous last axis; leading axes that one stride goes through; precision
            "f32" only.
        take: makes intermediates; default new arrays.
        stats: float32 [B * Hq * Tq, 4], for the greatest score m of each row and the inverse of
            its sum of exp(s - m), zeros for a row that sees no key; or None.
    """
    take = take or fresh(device)
    (heads, tq, dk), (kv_heads, tk, _), dv = q.shape[-3:], k.shape[-3:], v.shape[-1]
    if out is None:
        out = device.empty((*batch, heads, tq, dv), q.dtype)
    scores = device.empty((*batch, heads, tq, tk), np.float32) if options.scores else None
    if out.size == 0 and (scores is None or scores.size == 0):
        return out, scores
    place = reach(options)
    plain = not (options.mask is not None or options.softcap or options.dropout_p or options.scores)
    if plain and attention_half.fits(options.precision, options.scale, max(dk, dv)):
        attention_half.attention(device, q, k, v, batch, options.precision, place, out)
        return out, None
    if plain and attention_int8.fits(options.precision, v.dtype, options.scale, max(dk, dv)):
        attention_int8.attention(device, q, k, v, batch, place, out)
        return out, None
    count, group = math.prod(batch), heads // kv_heads
    each = 1 if tq * group <= _GROUPS else 4
    wide = 64 if dv <= 64 else 128
    tile = _GROUPS * each
    tiles, slices = -(-tq * group // tile), max(1, -(-dv // wide))
    parts = (
        1
        if scores is not None or stats is not None
        else attention_half.parts(device, tk, tiles * kv_heads * slices * count, _CHUNK_KEYS)
    )
    states = None
    if parts > 1:
        states = take("states", (count, heads, tq, parts, 1 + _LANES + dv))
    query, keys, values = (
        (_codes if options.precision == "int8" else vectors)(device, a, batch) for a in (q, k, v)
    )
    to = vectors(device, out, batch)[:5]
    device.launch(
        _MODULE,
        _ATTENTION[each, wide],
        (count * tiles * parts, kv_heads * slices),
        (_THREADS,),
        [
            *(*query[:5], *keys[:5], *values[:5], query[5], keys[5], values[5]),
            *(*to, states, np.int32(parts)),
            *map(np.int32, (tq, tk, group, kv_heads, dk, dv)),
            *place,
            *weighing(device, options, (*batch, heads, tq), tk),
            *(scores, np.int32(_SCORES[options.scores]), stats),
        ],
        4 * ((tile + _BLOCK_KEYS) * (_SLICE + 4) + tile * (_BLOCK_KEYS + 4)),
    )
    if parts > 1:
        device.launch(
            _MODULE,
            _MERGE,
            (count * heads * tq,),
            (-(-dv // 32) * 32,),
            [states, *to, *map(np.int32, (parts, heads, tq, dv))],
        )
    return out, scores


def fresh(device: Device) -> Take:
    """Intermediates as new arrays."""
    return lambda name, shape: device.empty(shape, np.float32)


def reach(options: AttentionOptions) -> list[Any]:
    """A kernel's lengths, past, left, right and scale."""
    right = 0 if options.causal else options.right
    extents = [options.past, *(_FAR if n < 0 else n for n in (options.left, right))]
    return [options.lengths, *map(np.int64, extents), np.float32(options.scale)]


def weighing(
    device: Device, options: AttentionOptions, rows: tuple[int, ...], keys: int
) -> list[Any]:
    """A kernel's softcap, mask over ``rows`` [..., Hq, Tq], and dropout."""
    return [
        np.float32(options.softcap),
        *_mask(device, options.mask, rows, keys),
        *_dropout(options),
    ]


def _mask(device: Device, mask: Any, rows: tuple[int, ...], keys: int) -> list[Any]:
    """A kernel's seven arguments for a mask over ``rows`` [..., Hq, Tq]."""
    if mask is None:
        return [None, np.int32(0), *(np.int64(0),) * 4, np.int32(keys)]
    width = mask.shape[-1]
    mask, strides = flat(device, mask, (*rows, width), 3)
    # A last axis of 1 is one value for all keys.
    reach = keys if width == 1 else width
    kind = np.int32(_MASKS[mask.dtype.name])
    return [mask, kind, *map(np.int64, strides), np.int32(reach)]


def _dropout(options: AttentionOptions) -> list[Any]:
    """A kernel's five arguments: seeds, or the first and the step to the next sequence's, what is
    dropped, the others' factor."""
    p, seeds = options.dropout_p, options.seeds
    first = seeds if isinstance(seeds, int) else seeds[0] if isinstance(seeds, range) else 0
    step = isinstance(seeds, range)
    array = None if step or isinstance(seeds, int) else seeds
    numbers = np.uint64(first % 2**64), np.uint64(step)
    return [array, *numbers, np.int32(np.rint(p * 2**24)), np.float32(1.0 / (1.0 - p))]


def _codes(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """The arguments of :func:`vectors` for int8 codes of its vectors."""
    found, scales = codes(device, array, batch)
    return [*vectors(device, found, found.shape[:1])[:5], scales]
