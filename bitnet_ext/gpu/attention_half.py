"""Attention over arrays on a device on its matrix units, in half precision."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.views import address, vectors

__all__ = [
    "BLOCK_KEYS",
    "KINDS",
    "WIDEST",
    "attention",
    "fits",
    "instances",
    "launch",
    "parts",
    "whole_words",
]

_TYPES = {"f16": "half_t", "bf16": "bfloat_t"}
KINDS = {"f16": "float16", "bf16": "bfloat16"}


def instances(kernel: str) -> dict[tuple[str, int, bool], str]:
    """By (precision, padded dimensions, whether arrays are copied as they are)."""
    return {
        (p, w, same): f"{kernel}<{_TYPES[p]}, {w}, {str(same).lower()}>"
        for p in _TYPES
        for w in (64, 128)
        for same in (True, False)
    }


_ATTENTION = instances("attention_half")
_MERGE = "merge_parts<HalfPart>"
_MODULE = Module("attention_half.cu", [*_ATTENTION.values(), _MERGE])

# As in flash_half.cuh, half_tiles.cuh and merge.cuh.
BLOCK_KEYS, _WARP_VECTORS, _MOST_WARPS, WIDEST = 64, 16, 4, 128
_CHUNK_KEYS, _SUMS = 256, 4


def fits(precision: str, scale: float, widest: int) -> bool:
    """Whether these kernels are for that precision, scale and largest of dk and dv."""
    return precision in _TYPES and scale > 0 and widest <= WIDEST


def parts(device: Device, keys: int, blocks: int, chunk: int) -> int:
    """Into how many the keys are split: where blocks are few, as many as there are chunks."""
    return max(1, -(-keys // chunk)) if 2 * blocks <= device.processors else 1


def attention(
    device: Device,
    q: Any,
    k: Any,
    v: Any,
    batch: tuple[int, ...],
    precision: str,
    place: list[Any],
    out: Any,
) -> None:
    """``out = softmax(scale q k^T) v``, q, k and v as ``gpu.attention.attention`` takes them.

    Args:
        place: a kernel's lengths, past, left, right and scale.
    """
    dk, dv = q.shape[-1], v.shape[-1]
    query, keys, values = (vectors(device, a, batch)[:5] for a in (q, k, v))
    wide = 64 if max(dk, dv) <= 64 else 128
    same = all(whole_words(rows, precision, n) for rows, n in ((keys, dk), (values, dv)))
    launch(
        device,
        (_MODULE, _ATTENTION[precision, wide, same], _MERGE),
        [*query, *keys, *values],
        (math.prod(batch), q.shape, k.shape),
        (dk, dv),
        place,
        out,
        2 * BLOCK_KEYS * wide * 2,
    )


def launch(
    device: Device,
    kernels: tuple[Module, str, str],
    operands: list[Any],
    shapes: tuple[int, tuple[int, ...], tuple[int, ...]],
    sizes: tuple[int, ...],
    place: list[Any],
    out: Any,
    stage: int,
) -> None:
    """Run a kernel of half_tiles.cuh, its keys split where blocks are few.

    Args:
        kernels: the module, its kernel, and the one that merges parts.
        operands: the kernel's arguments before ``out``.
        shapes: how many batch entries, and the shapes of q and k.
        sizes: of vectors, as the kernel takes them; the last is dv.
        stage: bytes of 64 keys and values in shared memory.
    """
    module, kernel, merge = kernels
    count, (*_, heads, tq, dk), (*_, kv_heads, tk, _) = shapes
    group, dv = heads // kv_heads, sizes[-1]
    wide = 64 if max(dk, dv) <= 64 else 128
    warps = min(-(-tq * group // _WARP_VECTORS), _MOST_WARPS)
    tiles = -(-tq * group // (_WARP_VECTORS * warps))
    split = parts(device, tk, tiles * kv_heads * count, _CHUNK_KEYS)
    states = None
    if split > 1:
        states = device.empty((count, heads, tq, split, 1 + _SUMS + dv), np.float32)
    to = vectors(device, out, out.shape[:-3])[:5]
    device.launch(
        module,
        kernel,
        (count * tiles * split, kv_heads),
        (32 * warps,),
        [
            *operands,
            *(*to[:2], states, np.int32(split)),
            *map(np.int32, (tq, tk, group, kv_heads, *sizes)),
            *place[:-1],
            np.float32(float(place[-1]) * math.log2(math.e)),
        ],
        2 * stage + 4 * warps * _WARP_VECTORS * wide,
    )
    if split > 1:
        device.launch(
            module,
            merge,
            (count * heads * tq,),
            (-(-dv // 32) * 32,),
            [states, *to, *map(np.int32, (split, heads, tq, dv))],
        )


def whole_words(rows: list[Any], precision: str, size: int) -> bool:
    """Whether vectors of ``size`` elements are whole, aligned words of 16 bytes of that type."""
    array, _, *strides = rows
    in_words = not any(n % 8 for n in (size, *map(int, strides)))
    return array.dtype.name == KINDS[precision] and in_words and address(array) % 16 == 0
