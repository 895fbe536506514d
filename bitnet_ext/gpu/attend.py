"""Causal attention of rows q | k | v over a :class:`DeviceCache`.

``attend`` follows ``append`` of the same rows (kv_append.py): a row attends to its own token's
rounded key and value too.  ``attend_step`` does both for one row of each sequence.  A row's result
has the same bits from a whole prefill, from one in chunks and from decode, alone and in any batch.

precision "f32" gives the CPU's bits, whatever the cache holds (only the sign of a zero that a sum
underflowed to may differ).  "f16" and "bf16" round q, k, v and the weights to half precision and
multiply on the matrix units, for dimensions up to 128: errors of about 1e-3 and 1e-2 of the largest
value.  There a later key or value that is not finite may show in earlier rows of the same call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.kv_append import positions_of, query_heads
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

__all__ = ["Precision", "StepRoom", "attend", "attend_step"]

Precision = Literal["f32", "f16", "bf16"]

# By (vectors of 16 threads, columns of values that a block has).
_EXACT = {(n, w): f"attend_rows<{n}, {w}>" for n in (1, 4) for w in (64, 128)}
_EXACT_MODULE = Module("attend.cu", list(_EXACT.values()))

# By (type of the cache, stages of shared memory).
_CACHE_TYPES = {"f32": "float", "f16": "half_t", "int8": "int8_t"}
_STEP = {(t, n): f"attend_step<{name}, {n}>" for t, name in _CACHE_TYPES.items() for n in (2, 4)}
_STEP_MODULE = Module("attend_step.cu", list(_STEP.values()))

# By (precision, padded dimensions, whether the cache holds that type).
_TYPES = {"f16": "half_t", "bf16": "bfloat_t"}
_HALF = {
    (p, w, same): f"attend_half<{_TYPES[p]}, {w}, {str(same).lower()}>"
    for p, same in (("f16", True), ("f16", False), ("bf16", False))
    for w in (64, 128)
}
_HALF_MODULE = Module("attend_half.cu", list(_HALF.values()))

# As in flash.cuh, flash_half.cuh and merge.cuh.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128
_WARP_VECTORS, _MOST_WARPS, _WIDEST = 16, 4, 128
_STEP_VECTORS = 8  # of a block, as in attend_step.cu
_STATIC = 2048  # bytes of shared memory that the kernel has besides
_CHUNK_KEYS: dict[Precision, int] = {"f32": 512, "f16": 256, "bf16": 256}
_SUMS: dict[Precision, int] = {"f32": 16, "f16": 4, "bf16": 4}  # of a state
KINDS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}


@dataclass(frozen=True)
class StepRoom:
    """Scratch of :func:`attend_step`: one for all layers, steps and precisions.

    Attributes:
        states: float32, of chunks of keys that blocks of their own take.
        tickets: int32, zero between steps: blocks of a row that have ended.
    """

    states: Any
    tickets: Any

    @classmethod
    def empty(cls, cache: DeviceCache, q_heads: int) -> StepRoom:
        """For steps of ``cache`` by ``q_heads`` query heads."""
        slices, wide = -(-cache.dv // _SLICE), min(cache.dv, _SLICE)
        each = max(
            slices * _parts(cache, "f32") * (1 + _SUMS["f32"] + wide),
            _parts(cache, "f16") * (1 + _SUMS["f16"] + cache.dv),
        )
        tiles = -(-(q_heads // cache.kv_heads) // _STEP_VECTORS)
        device, batch = cache.device, cache.batch_size
        tickets = device.empty((batch * cache.kv_heads * slices * tiles,), np.int32)
        tickets.fill(0)
        return cls(device.empty((batch * q_heads * each,), np.float32), tickets)


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
) -> None:
    """``out = softmax(scale q k^T) v`` over keys up to each row's own position.

    Args:
        qkv: the rows that ``append`` turned and stored, float32 ``[M, q_heads * dk + ...]``.
        rows: as given to ``append``, before ``advance``.
        out: float32 ``[M, q_heads * dv]`` on the device, contiguous rows; those of inactive
            sequences are left alone.
        scale: of the dot products, positive.
        window_left: keys before a row's own that it sees; -1: all.

    Raises:
        InvalidShapeError: shapes that do not fit, a precision that the dimensions do not have.
    """
    heads = _check(cache, qkv, rows, out, scale, precision)
    vectors = rows.longest * heads // cache.kv_heads
    if precision == "f32":
        kernel, tile, slices, shared = _exact_geometry(cache, vectors)
        module, block = _EXACT_MODULE, _THREADS
        extra = []
    else:
        kernel, tile, slices, block, shared = _half_geometry(cache, vectors, precision)
        module = _HALF_MODULE
        extra = [None, None, np.int32(1), None, None, np.int32(0)]
        scale *= math.log2(math.e)
    cache.device.launch(
        module,
        kernel,
        (-(-vectors // tile), cache.kv_heads * slices, cache.batch_size),
        (block,),
        [
            *_ends(qkv, out),
            *extra,
            *(rows.starts, cache.lengths, rows.active),
            *_cached(cache, layer, heads, window_left, scale, kind=True),
        ],
        shared,
    )


def attend_step(
    cache: DeviceCache,
    layer: int,
    qkv: Any,
    rows: DeviceRows,
    out: Any,
    cos: Any = None,
    sin: Any = None,
    *,
    scale: float,
    window_left: int = -1,
    precision: Precision = "f32",
    room: StepRoom | None = None,
) -> None:
    """``append`` and :func:`attend` of one row of each sequence, in one launch.

    Args:
        qkv: float32 ``[B, q_heads * dk + ...]``, left as it is.
        rows: of ``DeviceRows.one_each``.
        out: as of :func:`attend`, but rows of inactive sequences become zeros.
        cos, sin: as of ``append``.
        room: of :class:`StepRoom`; None: a new one.

    Raises:
        InvalidShapeError: as of :func:`attend` and ``append``.
    """
    heads = _check(cache, qkv, rows, out, scale, precision)
    positions = positions_of(cache, cos, sin)
    room = room or StepRoom.empty(cache, heads)
    group, parts = heads // cache.kv_heads, _parts(cache, precision)
    step = [room.states, room.tickets, np.int32(parts), cos, sin, np.int32(positions)]
    block: tuple[int, ...]
    if precision == "f32":
        kernel, shared = _step_geometry(cache)
        module, tile, slices, block = _STEP_MODULE, _STEP_VECTORS, -(-cache.dv // _SLICE), (32, 8)
        lengths = [cache.lengths, rows.active]
    else:
        # Warps without vectors help to copy keys and values.
        most = _MOST_WARPS * _WARP_VECTORS
        kernel, tile, slices, threads, shared = _half_geometry(cache, most, precision)
        module, block = _HALF_MODULE, (threads,)
        lengths = [None, cache.lengths, rows.active]
        scale *= math.log2(math.e)
    cache.device.launch(
        module,
        kernel,
        (-(-group // tile) * parts, cache.kv_heads * slices, cache.batch_size),
        block,
        [
            *_ends(qkv, out),
            *step,
            *lengths,
            *_cached(cache, layer, heads, window_left, scale, kind=precision != "f32"),
        ],
        shared,
    )


def _check(
    cache: DeviceCache, qkv: Any, rows: DeviceRows, out: Any, scale: float, precision: Precision
) -> int:
    """Query heads of rows that fit."""
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
    return heads


def _ends(qkv: Any, out: Any) -> list[Any]:
    """Where rows come from and go to."""
    return [qkv, np.int64(qkv.strides[0] // 4), out, np.int64(out.strides[0] // 4)]


def _cached(
    cache: DeviceCache, layer: int, heads: int, window_left: int, scale: float, *, kind: bool
) -> list[Any]:
    """A kernel's arguments from the page table on; ``kind``: it asks for the cache's type."""
    kept = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
    numbers = (
        *([KINDS[cache.kv_dtype]] if kind else []),
        *(heads // cache.kv_heads, cache.kv_heads, cache.dk, cache.dv),
        *(cache.keys.shape[-1], cache.values.shape[-1], window_left),
    )
    return [
        *(cache.table, np.int32(cache.table.shape[1]), np.int32(cache.page_tokens)),
        *(array[layer] for array in kept),
        *map(np.int32, numbers),
        np.float32(scale),
    ]


def _exact_geometry(cache: DeviceCache, vectors: int) -> tuple[str, int, int, int]:
    """(kernel, vectors of a tile, slices of dv, bytes of shared memory)."""
    each = 1 if vectors <= _GROUPS else 4
    wide = 64 if cache.dv <= 64 else 128
    tile = _GROUPS * each
    shared = 4 * ((tile + _BLOCK_KEYS) * (_SLICE + 4) + tile * (_BLOCK_KEYS + 4))
    return _EXACT[each, wide], tile, -(-cache.dv // wide), shared


def _step_geometry(cache: DeviceCache) -> tuple[str, int]:
    """(kernel, bytes of shared memory): as many stages as fit (attend_step.cu).

    Raises:
        InvalidShapeError: not even two do.
    """
    most = cache.device.block_memory - _STATIC
    size = cache.keys.dtype.itemsize
    stage = _BLOCK_KEYS * (_SLICE * size + 16)
    row = (cache.keys.shape[-1] + cache.values.shape[-1]) * size
    queries = 4 * _STEP_VECTORS * (-(-cache.dk // 16) * 16 + _BLOCK_KEYS + 4)
    rest = row + queries + 4 * (_BLOCK_KEYS + _STEP_VECTORS + 2)
    stages = 4 if 4 * stage + rest <= most else 2
    if stages * stage + rest > most:
        raise InvalidShapeError(
            f"cache: found heads of {max(cache.dk, cache.dv)}, which take {stages * stage + rest} "
            f"bytes of a block's memory, wanted at most {most}"
        )
    return _STEP[cache.kv_dtype, stages], stages * stage + rest


def _half_geometry(
    cache: DeviceCache, vectors: int, precision: Precision
) -> tuple[str, int, int, int, int]:
    """The same, with threads before the bytes."""
    wide = 64 if max(cache.dk, cache.dv) <= 64 else 128
    warps = min(-(-vectors // _WARP_VECTORS), _MOST_WARPS)
    kernel = _HALF[precision, wide, precision == cache.kv_dtype]
    stages = 2 * 2 * _BLOCK_KEYS * wide * 2  # two, of a tile of keys and one of values
    totals = 4 * warps * _WARP_VECTORS * wide
    return kernel, warps * _WARP_VECTORS, 1, 32 * warps, stages + totals


def _parts(cache: DeviceCache, precision: Precision) -> int:
    """Chunks of keys of the longest sequence."""
    return max(1, -(-cache.max_seq_len // _CHUNK_KEYS[precision]))
