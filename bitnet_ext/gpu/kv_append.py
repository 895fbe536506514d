"""Rotary positions and the append of keys and values to a :class:`DeviceCache`."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

__all__ = ["advance", "append"]

_KERNELS = {
    "f32": "append_rows<float>",
    "f16": "append_rows<half_t>",
    "int8": "append_rows<int8_t>",
}
_ADVANCE = "advance_lengths"
_MODULE = Module("kv_append.cu", [*_KERNELS.values(), _ADVANCE])
_HEADS = 4  # of a block, as in kv_append.cu
_THREADS = 128


def append(
    cache: DeviceCache, layer: int, qkv: Any, rows: DeviceRows, cos: Any = None, sin: Any = None
) -> int:
    """Turn q in place, and store k, turned, and v at the rows' positions.

    Nothing is written at positions that the cache or the tables have no room for; callers ask
    ``cache.check_room`` first.

    Args:
        qkv: float32 ``[M, q_heads * dk + kv_heads * (dk + dv)]`` on the device, contiguous rows.
        cos, sin: float32 ``[P, dk / 2]`` on the device, row p for position p; None: no rotation.

    Returns:
        The number of query heads.

    Raises:
        InvalidShapeError: shapes that do not fit.
    """
    heads = query_heads(cache, qkv, rows)
    positions = positions_of(cache, cos, sin)
    cache.device.launch(
        _MODULE,
        _KERNELS[cache.kv_dtype],
        (rows.count, -(-(heads + 2 * cache.kv_heads) // _HEADS)),
        (32, _HEADS),
        [
            qkv,
            np.int64(qkv.strides[0] // 4),
            cos,
            sin,
            np.int32(positions),
            rows.sequence,
            rows.starts,
            cache.lengths,
            rows.active,
            cache.table,
            np.int32(cache.table.shape[1]),
            np.int32(cache.page_tokens),
            cache.keys[layer],
            cache.values[layer],
            cache.key_scales[layer],
            cache.value_scales[layer],
            *map(
                np.int32,
                (
                    heads,
                    cache.kv_heads,
                    cache.dk,
                    cache.dv,
                    cache.keys.shape[-1],
                    cache.values.shape[-1],
                ),
            ),
        ],
    )
    return heads


def advance(cache: DeviceCache, rows: DeviceRows) -> None:
    """Count the rows as held, on the device; ``cache.note`` tells the host's mirror."""
    batch = cache.batch_size
    cache.device.launch(
        _MODULE,
        _ADVANCE,
        (-(-batch // _THREADS),),
        (_THREADS,),
        [
            cache.lengths,
            rows.starts,
            rows.active,
            np.int32(batch),
            np.int32(cache.max_seq_len),
        ],
    )


def positions_of(cache: DeviceCache, cos: Any, sin: Any) -> int:
    """Positions that the cache, and the tables if there are any, have room for.

    Raises:
        InvalidShapeError: tables of another width.
    """
    if cos is None:
        return cache.max_seq_len
    if cos.shape != sin.shape or cos.ndim != 2 or 2 * cos.shape[1] != cache.dk:
        raise InvalidShapeError(
            f"cos, sin: found {cos.shape}, {sin.shape}, wanted [P, {cache.dk} / 2] twice"
        )
    return min(cache.max_seq_len, int(cos.shape[0]))


def query_heads(cache: DeviceCache, qkv: Any, rows: DeviceRows) -> int:
    """Query heads in rows q | k | v of the cache's shape.

    Raises:
        InvalidShapeError: rows of another width, count or dtype.
    """
    rest = qkv.shape[-1] - cache.kv_heads * (cache.dk + cache.dv)
    heads = rest // cache.dk
    fits = rest > 0 and rest % (cache.dk * cache.kv_heads) == 0 and qkv.shape[:-1] == (rows.count,)
    if not fits or qkv.dtype != np.float32 or qkv.strides[-1] != 4:
        raise InvalidShapeError(
            f"qkv: found {qkv.dtype} {qkv.shape}, wanted contiguous float32 rows [{rows.count}, "
            f"q_heads * {cache.dk} + {cache.kv_heads} * ({cache.dk} + {cache.dv})] with q_heads a "
            f"multiple of {cache.kv_heads}"
        )
    return int(heads)
