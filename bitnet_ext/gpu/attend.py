"""Causal attention of rows q | k | v over a :class:`DeviceCache`.

``attend`` follows ``append`` of the same rows (kv_append.py): a row attends to its own token's
rounded key and value too.  A row's result has the same bits from a whole prefill, from one in
chunks and from decode, alone and in any batch.

precision "f32" gives the CPU's bits, whatever the cache holds (only the sign of a zero that a sum
underflowed to may differ).  "f16" and "bf16" round q, k, v and the weights to half precision and
multiply on the matrix units, for dimensions up to 128: errors of about 1e-3 and 1e-2 of the largest
value.  There a later key or value that is not finite may show in earlier rows of the same call.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.kv_append import query_heads
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

__all__ = ["Precision", "attend", "new_states"]

Precision = Literal["f32", "f16", "bf16"]

# By (vectors of 16 threads, columns of values that a block has).
_EXACT = {(n, w): f"attend_rows<{n}, {w}>" for n in (1, 4) for w in (64, 128)}
_EXACT_MERGE = "merge_rows<ExactPart>"
_EXACT_MODULE = Module("attend.cu", [*_EXACT.values(), _EXACT_MERGE])

# By (precision, padded dimensions, whether the cache holds that type).
_TYPES = {"f16": "half_t", "bf16": "bfloat_t"}
_HALF = {
    (p, w, same): f"attend_half<{_TYPES[p]}, {w}, {str(same).lower()}>"
    for p, same in (("f16", True), ("f16", False), ("bf16", False))
    for w in (64, 128)
}
_HALF_MERGE = "merge_rows<HalfPart>"
_HALF_MODULE = Module("attend_half.cu", [*_HALF.values(), _HALF_MERGE])

# As in flash.cuh, flash_half.cuh and merge.cuh.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128
_WARP_VECTORS, _MOST_WARPS, _WIDEST = 16, 4, 128
_CHUNK_KEYS: dict[Precision, int] = {"f32": 512, "f16": 256, "bf16": 256}
_SUMS: dict[Precision, int] = {"f32": 16, "f16": 4, "bf16": 4}  # of a state
KINDS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}


def new_states(cache: DeviceCache, q_heads: int) -> Any:
    """Scratch for :func:`attend` of one row a sequence: one for all layers, steps, precisions."""
    each = max(_parts(cache, p) * (1 + sums + cache.dv) for p, sums in _SUMS.items())
    return cache.device.empty((cache.batch_size * q_heads * each,), np.float32)


def attend(
    cache: DeviceCache,
    layer: int,
    qkv: Any,
    rows: DeviceRows,
    out: Any,
    *,
    scale: float,
    window_left: int = -1,
    precision: Precision = "f32",
    states: Any = None,
) -> None:
    """``out = softmax(scale q k^T) v`` over keys up to each row's own position.

    Args:
        qkv: the rows that ``append`` turned and stored, float32 ``[M, q_heads * dk + ...]``.
        rows: as given to ``append``, before ``advance``.
        out: float32 ``[M, q_heads * dv]`` on the device, contiguous rows; rows of inactive
            sequences become zeros.
        scale: of the dot products, positive.
        window_left: keys before a row's own that it sees; -1: all.
        states: of :func:`new_states` for one row a sequence; None: new ones.

    Raises:
        InvalidShapeError: shapes that do not fit, a precision that the dimensions do not have.
    """
    heads = query_heads(cache, qkv, rows)
    if out.dtype != np.float32 or out.shape != (rows.count, heads * cache.dv):
        raise InvalidShapeError(
            f"out: found {out.dtype} {out.shape}, wanted float32 {(rows.count, heads * cache.dv)}"
        )
    widest = max(cache.dk, cache.dv)
    if precision not in _CHUNK_KEYS or (precision != "f32" and widest > _WIDEST):
        raise InvalidShapeError(
            f"precision: found {precision!r} for heads of {widest}, wanted 'f32', or 'f16' or "
            f"'bf16' up to {_WIDEST}"
        )
    if not (scale > 0 and math.isfinite(scale)):
        raise InvalidShapeError(f"scale: found {scale}, wanted a positive number")
    group = heads // cache.kv_heads
    split = rows.starts is None and (_parts(cache, precision) > 1 or rows.active is not None)
    parts = _parts(cache, precision) if split else 1
    if split and states is None:
        states = new_states(cache, heads)
    if precision == "f32":
        module, merge = _EXACT_MODULE, _EXACT_MERGE
        kernel, tile, slices, block, shared = _exact_geometry(cache, rows.longest * group)
    else:
        module, merge = _HALF_MODULE, _HALF_MERGE
        kernel, tile, slices, block, shared = _half_geometry(cache, rows.longest * group, precision)
        scale *= math.log2(math.e)
    tiles = -(-rows.longest * group // tile)
    q_stride, out_stride = np.int64(qkv.strides[0] // 4), np.int64(out.strides[0] // 4)
    table = [cache.table, np.int32(cache.table.shape[1]), np.int32(cache.page_tokens)]
    kept = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
    widths = (cache.dk, cache.dv, cache.keys.shape[-1], cache.values.shape[-1])
    numbers = (KINDS[cache.kv_dtype], group, cache.kv_heads, *widths, window_left)
    cache.device.launch(
        module,
        kernel,
        (tiles * parts, cache.kv_heads * slices, cache.batch_size),
        (block,),
        [
            *(qkv, q_stride, out, out_stride, states if split else None, np.int32(parts)),
            *(rows.starts, cache.lengths, rows.active),
            *table,
            *(array[layer] for array in kept),
            *map(np.int32, numbers),
            np.float32(scale),
        ],
        shared,
    )
    if split:
        cache.device.launch(
            module,
            merge,
            (rows.count, heads),
            (-(-cache.dv // 32) * 32,),
            [
                *(states, out, out_stride, np.int32(parts), cache.lengths, rows.active),
                *map(np.int32, (cache.dv, window_left)),
            ],
        )


def _exact_geometry(cache: DeviceCache, vectors: int) -> tuple[str, int, int, int, int]:
    """(kernel, vectors of a tile, slices of dv, threads, bytes of shared memory)."""
    each = 1 if vectors <= _GROUPS else 4
    wide = 64 if cache.dv <= 64 else 128
    tile = _GROUPS * each
    shared = 4 * ((tile + _BLOCK_KEYS) * (_SLICE + 4) + tile * (_BLOCK_KEYS + 4))
    return _EXACT[each, wide], tile, -(-cache.dv // wide), _THREADS, shared


def _half_geometry(
    cache: DeviceCache, vectors: int, precision: Precision
) -> tuple[str, int, int, int, int]:
    wide = 64 if max(cache.dk, cache.dv) <= 64 else 128
    warps = min(-(-vectors // _WARP_VECTORS), _MOST_WARPS)
    kernel = _HALF[precision, wide, precision == cache.kv_dtype]
    stages = 2 * 2 * _BLOCK_KEYS * wide * 2  # two, of a tile of keys and one of values
    totals = 4 * warps * _WARP_VECTORS * wide
    return kernel, warps * _WARP_VECTORS, 1, 32 * warps, stages + totals


def _parts(cache: DeviceCache, precision: Precision) -> int:
    """Chunks of keys of the longest sequence."""
    return max(1, -(-cache.max_seq_len // _CHUNK_KEYS[precision]))
