"""Scaled dot-product attention over arrays of the caller's."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.arguments import whole_number, window_extents
from bitnet_ext.errors import InvalidShapeError

__all__ = ["attention"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Window = tuple[int, int]
Scores = Literal["raw", "softcap", "mask", "softmax"]

_FAR = 1 << 40  # positions, lengths and windows stay below it
_SCORES = ("raw", "softcap", "mask", "softmax")


@overload
def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = ...,
    past_len: int = ...,
    mask: npt.ArrayLike | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    window: Window | None = ...,
    kv_lengths: npt.ArrayLike | None = ...,
    dropout_p: float = ...,
    seed: npt.ArrayLike | None = ...,
    precision: Literal["f32", "int8"] = ...,
    return_scores: None = ...,
) -> Array: ...
@overload
def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = ...,
    past_len: int = ...,
    mask: npt.ArrayLike | None = ...,
    scale: float | None = ...,
    softcap: float = ...,
    window: Window | None = ...,
    kv_lengths: npt.ArrayLike | None = ...,
    dropout_p: float = ...,
    seed: npt.ArrayLike | None = ...,
    precision: Literal["f32", "int8"] = ...,
    return_scores: Scores,
) -> tuple[Array, Float32]: ...
def attention(
    q: npt.ArrayLike,
    k: npt.ArrayLike,
    v: npt.ArrayLike,
    *,
    causal: bool = False,
    past_len: int = 0,
    mask: npt.ArrayLike | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    window: Window | None = None,
    kv_lengths: npt.ArrayLike | None = None,
    dropout_p: float = 0.0,
    seed: npt.ArrayLike | None = None,
    precision: Literal["f32", "int8"] = "f32",
    return_scores: Scores | None = None,
) -> Array | tuple[Array, Float32]:
    """Attention of q over k and v: ``softmax(scale q k^T + mask) v``, head by head.

    Blocks of 64 keys with an online softmax (FlashAttention, arXiv:2205.14135), so memory beside
    the arrays does not grow with T; the options are those of the ONNX Attention operator (opset
    24). Scores pass ``softcap * tanh(s / softcap)``, then the mask. Masked keys are skipped: NaN or
    infinity in them never shows, and a row that sees no key is zeros. A key whose masked score is
    -inf is not seen. The result has the same bits in every batch, for any part of the queries
    (``past_len`` moved along), on every ISA and any number of threads.

    Args:
        q, k, v: float32, float16 or bfloat16 (ml_dtypes) ``[..., Hq, Tq, Dk]``,
            ``[..., Hkv, Tk, Dk]``, ``[..., Hkv, Tk, Dv]``; leading axes broadcast. Hq is a multiple
            of Hkv: kv head j serves query heads j * Hq / Hkv and on. Views with a contiguous last
            axis are read in place. Sums are float32.
        causal: query i sees key j when j <= i + offset. The offset is ``past_len``, or
            ``kv_lengths - Tq``; with neither, 0: top-left, unlike ``create_causal_mask``.
        past_len: keys before the first query.
        mask: bool (True: attend) or additive float, broadcast to ``[..., Hq, Tq, Tk]``; a last axis
            shorter than Tk (and not 1) hides the keys after it.
        scale: of the dot products; default 1 / sqrt(Dk).
        softcap: bound of the scores; 0: none.
        window: (left, right) keys seen around the diagonal, -1: unbounded.
        kv_lengths: integers [...]: keys of each sequence that exist; later ones are hidden.
        dropout_p, seed: the part of the weights set to zero, the others divided by 1 - p. The seed
            is an integer, or one for each sequence: the same seed drops the same weights, by
            position and head alone (Philox4x32-10; csrc/attention/dense.h gives the counters), so
            sequences that share a seed share the pattern.
        precision: "int8" rounds each q and k vector to 255 levels of its largest element: a score
            is off by at most ``scale (|q|_1 max|k| + |k|_1 max|q|) / 254`` and a term 254 times
            smaller; usually 1e-2.
        return_scores: also give the scores float32 ``[..., Hq, Tq, Tk]`` after that step.

    Returns:
        ``[..., Hq, Tq, Dv]`` in the dtype of q; with ``return_scores`` a pair of it and the scores.

    Raises:
        InvalidShapeError: shapes, dtypes or values that do not fit; ``past_len`` with
            ``kv_lengths``; ``dropout_p`` without a seed.
    """
    query, keys, values = _operand("q", q), _operand("k", k), _operand("v", v)
    batch = _batch(query, keys, values)
    shape = (*batch, *query.shape[-3:-1])
    k_len = keys.shape[-2]
    past = whole_number("past_len", past_len, _FAR)
    lengths = None if kv_lengths is None else _lengths(kv_lengths, batch, k_len)
    if lengths is not None and past:
        raise InvalidShapeError(
            f"past_len: found {past} together with kv_lengths, which place the queries; wanted one"
        )
    left, right = (min(side, _FAR) for side in window_extents(window))
    out = np.empty((*shape, values.shape[-1]), np.float32)
    scores = None if return_scores is None else _scores(return_scores, (*shape, k_len))
    _core.attention(
        _bits(np.broadcast_to(query, batch + query.shape[-3:])),
        _bits(np.broadcast_to(keys, batch + keys.shape[-3:])),
        _bits(np.broadcast_to(values, batch + values.shape[-3:])),
        out,
        None if mask is None else _mask(mask, shape, k_len),
        lengths,
        _seeds(seed, batch) if _dropout(dropout_p, seed) else None,
        causal,
        past,
        left,
        right,
        _scale(scale, query.shape[-1]),
        _finite("softcap", softcap, 0.0),
        dropout_p,
        _precision(precision),
        scores,
        return_scores or "",
    )
    result = out if query.dtype == np.float32 else out.astype(query.dtype)
    return result if scores is None else (result, scores)


def _operand(name: str, value: npt.ArrayLike) -> Array:
    """An array of three axes or more with a contiguous last one; a copy only where it is not."""
    array = np.asarray(value)
    if array.ndim < 3 or not _is_float(array.dtype):
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted float32, float16 or bfloat16 "
            "[..., H, T, D]"
        )
    return _rows(array)


def _is_float(dtype: np.dtype[Any]) -> bool:
    return dtype in (np.float32, np.float16) or dtype.name == "bfloat16"


def _rows(array: Array) -> Array:
    contiguous = array.shape[-1] < 2 or array.strides[-1] == array.itemsize
    return array if contiguous and array.dtype.isnative else np.ascontiguousarray(array)


def _bits(array: Array) -> Array:
    return array.view(np.uint16) if array.dtype.name == "bfloat16" else array


def _batch(q: Array, k: Array, v: Array) -> tuple[int, ...]:
    """The common leading axes of operands that fit each other."""
    heads, kv_heads = q.shape[-3], k.shape[-3]
    fit = (
        k.shape[-1] == q.shape[-1]
        and v.shape[-3:-1] == k.shape[-3:-1]
        and (heads % kv_heads == 0 if kv_heads else heads == 0)
    )
    try:
        batch = np.broadcast_shapes(*(a.shape[:-3] for a in (q, k, v)))
    except ValueError:
        fit = False
    if not fit:
        raise InvalidShapeError(
            f"q, k, v: found {q.shape}, {k.shape}, {v.shape}, wanted [..., Hq, Tq, Dk], "
            "[..., Hkv, Tk, Dk], [..., Hkv, Tk, Dv] with Hq a multiple of Hkv"
        )
    return batch


def _mask(value: npt.ArrayLike, shape: tuple[int, ...], k_len: int) -> Array:
    """The mask as a view [..., Hq, Tq, keys], keys <= Tk."""
    mask = np.asarray(value)
    if mask.dtype == np.float64:
        mask = mask.astype(np.float32)
    if mask.ndim == 0:
        mask = mask.reshape(1)
    wanted = f"bool or float broadcast to {(*shape, k_len)}, the last axis perhaps shorter"
    if (mask.dtype != np.bool_ and not _is_float(mask.dtype)) or mask.shape[-1] > max(k_len, 1):
        raise InvalidShapeError(f"mask: found {mask.dtype} {mask.shape}, wanted {wanted}")
    mask = _rows(mask)
    try:
        return _bits(np.broadcast_to(mask, (*shape, mask.shape[-1])))
    except ValueError:
        raise InvalidShapeError(f"mask: found {mask.shape}, wanted {wanted}") from None


def _lengths(value: npt.ArrayLike, batch: tuple[int, ...], k_len: int) -> npt.NDArray[np.int64]:
    lengths = _integers("kv_lengths", value, batch)
    if lengths.size and (lengths.min() < 0 or lengths.max() > k_len):
        raise InvalidShapeError(f"kv_lengths: found {value!r}, wanted 0 to {k_len}")
    return lengths.astype(np.int64)


def _seeds(value: Any, batch: tuple[int, ...]) -> npt.NDArray[np.uint64]:
    if isinstance(value, int) and not isinstance(value, bool):
        value = np.uint64(value & 0xFFFFFFFFFFFFFFFF)
    return _integers("seed", value, batch).astype(np.uint64)


def _integers(name: str, value: Any, batch: tuple[int, ...]) -> Array:
    array = np.asarray(value)
    if array.dtype.kind in "iu" or array.size == 0:
        try:
            return np.ascontiguousarray(np.broadcast_to(array, batch)).reshape(-1)
        except ValueError:
            pass
    raise InvalidShapeError(f"{name}: found {value!r}, wanted integers {batch}")


def _finite(name: str, value: float, least: float = -math.inf) -> float:
    if not math.isfinite(value) or value < least:
        raise InvalidShapeError(f"{name}: found {value!r}, wanted a finite number >= {least}")
    return float(value)


def _scale(scale: float | None, dk: int) -> float:
    return 1.0 / math.sqrt(max(dk, 1)) if scale is None else _finite("scale", scale)


def _dropout(dropout_p: float, seed: Any) -> bool:
    if not 0.0 <= dropout_p < 1.0:
        raise InvalidShapeError(f"dropout_p: found {dropout_p!r}, wanted 0 <= p < 1")
    if dropout_p and seed is None:
        raise InvalidShapeError("seed: found None, wanted an integer where dropout_p > 0")
    return dropout_p > 0.0


def _precision(precision: str) -> bool:
    if precision not in ("f32", "int8"):
        raise InvalidShapeError(f"precision: found {precision!r}, wanted 'f32' or 'int8'")
    return precision == "int8"


def _scores(kind: str, shape: tuple[int, ...]) -> Float32:
    if kind not in _SCORES:
        raise InvalidShapeError(f"return_scores: found {kind!r}, wanted one of {_SCORES}")
    return np.empty(shape, np.float32)
