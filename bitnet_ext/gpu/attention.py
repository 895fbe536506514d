"""Attention over arrays on a device, every option of the CPU's and its bits; linear in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.gpu import attention_half, attention_int8
from bitnet_ext.gpu.attention_codes import codes
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import KINDS, flat, vectors

__all__ = ["AttentionOptions", "attention"]

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
    seeds: Any  # uint64 [B], or an int for all; None: no dropout
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
    right = 0 if options.causal else options.right
    extents = [options.past, *(_FAR if n < 0 else n for n in (options.left, right))]
    place = [options.lengths, *map(np.int64, extents), np.float32(options.scale)]
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
        if scores is not None
        else attention_half.parts(device, tk, tiles * kv_heads * slices * count, _CHUNK_KEYS)
    )
    states = None
    if parts > 1:
        states = device.empty((count, heads, tq, parts, 1 + _LANES + dv), np.float32)
    query, keys = (
        (_codes if options.precision == "int8" else vectors)(device, a, batch) for a in (q, k)
    )
    values = vectors(device, v, batch)
    device.launch(
        _MODULE,
        _ATTENTION[each, wide],
        (count * tiles * parts, kv_heads * slices),
        (_THREADS,),
        [
            *(*query[:5], *keys[:5], *values[:5], query[5], keys[5]),
            *(out, np.int32(KINDS[out.dtype.name]), states, np.int32(parts)),
            *map(np.int32, (tq, tk, group, kv_heads, dk, dv)),
            *(*place, np.float32(options.softcap)),
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
            [states, out, *map(np.int32, (KINDS[out.dtype.name], parts, dv))],
        )
    return out, scores


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
    """A kernel's four arguments: seeds, the seed of all, what is dropped, the others' factor."""
    p, seeds = options.dropout_p, options.seeds
    seed = seeds if isinstance(seeds, int) else 0
    seeds = None if isinstance(seeds, int) else seeds
    dropped = np.rint(p * 2**24)
    return [seeds, np.uint64(seed), np.int32(dropped), np.float32(1.0 / (1.0 - p))]


def _codes(device: Device, array: Any, batch: tuple[int, ...]) -> list[Any]:
    """The arguments of :func:`vectors` for int8 codes of its vectors."""
    found, scales = codes(device, array, batch)
    return [*vectors(device, found, found.shape[:1])[:5], scales]
