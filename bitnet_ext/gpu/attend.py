"""Causal attention of rows q | k | v over a :class:`DeviceCache`.

``attend`` follows ``append`` of the same rows (kv_append.py): a row attends to its own token's
rounded key and value too.  A row's result has the same bits from a whole prefill, from one in
chunks and from decode, alone and in any batch; with precision "f32" they are the CPU's bits.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.kv_append import query_heads
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

__all__ = ["Precision", "attend", "new_states"]

Precision = Literal["f32"]

# (vectors of 16 threads, columns of values that a block has)
_SHAPES = [(1, 64), (1, 128), (4, 64), (4, 128)]
_ROWS = {shape: f"attend_rows<{shape[0]}, {shape[1]}>" for shape in _SHAPES}
_MERGE = "merge_rows<ExactPart>"
_MODULE = Module("attend.cu", [*_ROWS.values(), _MERGE])

# As in flash.cuh and merge.cuh.
_THREADS, _GROUPS, _BLOCK_KEYS, _SLICE = 128, 8, 64, 128
_CHUNK_KEYS, _LANES = 512, 16
KINDS = {"f32": 0, "f16": 1, "bf16": 2, "int8": 3}


def new_states(cache: DeviceCache, q_heads: int, precision: Precision = "f32") -> Any:
    """Scratch float32 for :func:`attend` of one row a sequence, to be used again at every step."""
    return cache.device.empty(
        (cache.batch_size, q_heads, _parts(cache), 2 + _LANES + cache.dv), np.float32
    )


def attend(
    cache: DeviceCache,
    layer: int,
    qkv: Any,
    rows: DeviceRows,
    out: Any,
    *,
    scale: float,
    window_left: int = -1,
    states: Any = None,
) -> None:
    """``out = softmax(scale q k^T) v`` over keys up to each row's own position.

    Args:
        qkv: the rows that ``append`` turned and stored, float32 ``[M, q_heads * dk + ...]``.
        rows: as given to ``append``, before ``advance``.
        out: float32 ``[M, q_heads * dv]`` on the device, contiguous rows; rows of inactive
            sequences become zeros.
        window_left: keys before a row's own that it sees; -1: all.
        states: of :func:`new_states` for one row a sequence; None: new ones.

    Raises:
        InvalidShapeError: shapes that do not fit.
    """
    heads = query_heads(cache, qkv, rows)
    if out.dtype != np.float32 or out.shape != (rows.count, heads * cache.dv):
        raise InvalidShapeError(
            f"out: found {out.dtype} {out.shape}, wanted float32 {(rows.count, heads * cache.dv)}"
        )
    group = heads // cache.kv_heads
    split = rows.starts is None and (_parts(cache) > 1 or rows.active is not None)
    parts = _parts(cache) if split else 1
    if split and states is None:
        states = new_states(cache, heads)
    each = 1 if rows.longest * group <= _GROUPS else 4
    wide = 64 if cache.dv <= 64 else 128
    vectors = _GROUPS * each
    tiles = -(-rows.longest * group // vectors)
    stride = np.int64(out.strides[0] // 4)
    cache.device.launch(
        _MODULE,
        _ROWS[each, wide],
        (tiles * parts, cache.kv_heads * -(-cache.dv // wide), cache.batch_size),
        (_THREADS,),
        [
            qkv,
            np.int64(qkv.strides[0] // 4),
            out,
            stride,
            states if split else None,
            np.int32(parts),
            rows.starts,
            cache.lengths,
            rows.active,
            cache.table,
            *map(np.int32, (cache.table.shape[1], cache.page_tokens)),
            cache.keys[layer],
            cache.values[layer],
            cache.key_scales[layer],
            cache.value_scales[layer],
            *map(
                np.int32,
                (
                    KINDS[cache.kv_dtype],
                    group,
                    cache.kv_heads,
                    cache.dk,
                    cache.dv,
                    cache.keys.shape[-1],
                    cache.values.shape[-1],
                    window_left,
                ),
            ),
            np.float32(scale),
        ],
        4 * ((vectors + _BLOCK_KEYS) * (_SLICE + 4) + vectors * (_BLOCK_KEYS + 4)),
    )
    if split:
        cache.device.launch(
            _MODULE,
            _MERGE,
            (rows.count, heads),
            (-(-cache.dv // 32) * 32,),
            [
                states,
                out,
                stride,
                np.int32(parts),
                cache.lengths,
                rows.active,
                *map(np.int32, (cache.dv, window_left)),
            ],
        )


def _parts(cache: DeviceCache) -> int:
    """Chunks of keys of the longest sequence."""
    return max(1, -(-cache.max_seq_len // _CHUNK_KEYS))
