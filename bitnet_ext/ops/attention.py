"""Scaled dot-product attention over arrays of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args, overload

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.interchange import kind_of
from bitnet_ext.ops.operands import Array, Operands, Window

__all__ = ["attend_into", "attention", "check_sizes", "exact", "worth"]

Float32 = npt.NDArray[np.float32]
Precision = Literal["f32", "int8", "f16", "bf16"]
Scores = Literal["raw", "softcap", "mask", "softmax"]

_SCORES = ("raw", "softcap", "mask", "softmax")
_MOST_DIMENSIONS = 1024  # kMaxHeadDim


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
    precision: Precision = ...,
    return_scores: None = ...,
    device: str = ...,
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
    precision: Precision = ...,
    return_scores: Scores,
    device: str = ...,
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
    precision: Precision = "f32",
    return_scores: Scores | None = None,
    device: str = "auto",
) -> Array | tuple[Array, Float32]:
    """Attention of q over k and v: ``softmax(scale q k^T + mask) v``, head by head.

    Blocks of 64 keys with an online softmax (FlashAttention, arXiv:2205.14135), so memory beside
    the arrays does not grow with T; the options are those of the ONNX Attention operator (opset
    24). Scores pass ``softcap * tanh(s / softcap)``, then the mask. Masked keys are skipped: NaN or
    infinity in them never shows, and a row that sees no key is zeros. A key whose masked score is
    -inf is not seen. The result has the same bits in every batch, for any part of the queries
    (``past_len`` moved along), on every ISA and any number of threads, and on a CUDA device, where
    it is made when q, k and v are there.  Arrays may be of NumPy, CuPy or another library with
    DLPack; the result is of q's.  For a q on a device, a mask, lengths or seeds may be on the host
    or there; lengths that are there are not read, but clamped to Tk.

    Args:
        q, k, v: float32, float16 or bfloat16 (ml_dtypes) ``[..., Hq, Tq, Dk]``,
            ``[..., Hkv, Tk, Dk]``, ``[..., Hkv, Tk, Dv]``; leading axes broadcast. Hq is a multiple
            of Hkv: kv head j serves query heads j * Hq / Hkv and on. Views with a contiguous last
            axis are read in place. Sums are float32.
        causal: query i sees key j when j <= i + offset. The offset is ``past_len``, or
            ``kv_lengths - Tq``; with neither, 0: top-left, unlike ``create_causal_mask``.
        past_len: keys before the first query.
        mask: bool (True: attend) or additive float, broadcast to ``[..., Hq, Tq, Tk]``; a last axis
            shorter than Tk (and not 1) hides the keys after it. On the host it is read in place,
            whatever its strides.
        scale: of the dot products; default 1 / sqrt(Dk).
        softcap: bound of the scores; 0: none.
        window: (left, right) keys seen around the diagonal, -1: unbounded.
        kv_lengths: integers [...]: keys of each sequence that exist; later ones are hidden.
        dropout_p, seed: the part of the weights set to zero, the others divided by 1 - p. The seed
            is an integer, or one for each sequence: the same seed drops the same weights, by
            position and head alone (Philox4x32-10; csrc/attention/dense.h gives the counters), so
            sequences that share a seed share the pattern.
        precision: "int8" rounds each q, k and v vector to 255 levels of its largest element, and
            weights to 2048 of the largest among 64 keys. A score is off by at most
            ``scale (|q|_1 max|k| + |k|_1 max|q|) / 254`` and a term 254 times smaller, usually
            1e-2; after that the result by ``sum p max|v| / 254``, and for each 64 keys (from a
            multiple of 64 on) the largest ``p max|v|`` among them / 63. NaN or infinity in a value
            that is seen makes the row NaN. On a CUDA device also "f16" and "bf16", the speed of its
            matrix units: operands and weights are rounded to that type, errors of about 1e-3 and
            1e-2 of the largest value, the same bits in every batch and for any part of the queries.
            "int8" there has the CPU's bits, but where v is float16 or bfloat16 it keeps v and
            rounds weights to its type: 2^-11 or 2^-9 of the largest value. With these NaN or
            infinity in a hidden value may show. Sizes above 128, a mask, softcap, dropout and
            scores have the bits of "f32", and "int8" those of the CPU.
        return_scores: also give the scores float32 ``[..., Hq, Tq, Tk]`` after that step.
        device: where arrays of the host are worked on: "cpu", "cuda" (copied there and back), or
            "auto": with the precision "f32" on a device that is there, if that is faster by
            ``gpu/dispatch.py``'s table.

    Returns:
        ``[..., Hq, Tq, Dv]`` in the dtype of q; with ``return_scores`` a pair of it and the scores.

    Raises:
        InvalidShapeError: shapes, dtypes or values that do not fit; ``past_len`` with
            ``kv_lengths``; ``dropout_p`` without a seed.
        DeviceUnavailableError: q is on a CUDA device that CuPy cannot use, or ``device`` is not
            there.
    """
    options: dict[str, Any] = {
        "causal": causal,
        "past_len": past_len,
        "mask": mask,
        "scale": scale,
        "softcap": softcap,
        "window": window,
        "kv_lengths": kv_lengths,
        "dropout_p": dropout_p,
        "seed": seed,
    }
    as_given = kind_of("q", q)
    operands = Operands(q, k, v, **options)
    found = _attend(operands, options, precision, return_scores, device)
    if isinstance(found, tuple):
        return as_given(found[0]), as_given(found[1])
    return as_given(found)


def _attend(
    operands: Operands,
    options: dict[str, Any],
    precision: Precision,
    return_scores: Scores | None,
    device: str,
) -> Array | tuple[Array, Float32]:
    """Where the operands are, or by way of a device."""
    if operands.device is not None:
        return _on_device(operands, precision, return_scores)
    scores = 0 if return_scores is None else 4 * math.prod(operands.rows) * operands.k_len
    pays = device == "auto" and precision == "f32" and worth(operands, more=scores)
    if pays or device not in ("auto", "cpu"):

        def by_way_of(gpu: Device) -> Array | tuple[Array, Float32]:
            there = [dispatch.send(gpu, array) for array in operands.arrays]
            found = _on_device(Operands(*there, **options), precision, return_scores)
            if isinstance(found, tuple):
                return dispatch.fetch(gpu, found[0]), dispatch.fetch(gpu, found[1])
            return dispatch.fetch(gpu, found)

        if (result := dispatch.attempt(device, by_way_of)) is not None:
            return result
    return _on_host(operands, precision, return_scores)


def _on_host(
    operands: Operands, precision: str, return_scores: Scores | None
) -> Array | tuple[Array, Float32]:
    out = np.empty(operands.out_shape, np.float32)
    shape = (*operands.rows, operands.k_len)
    scores = None if return_scores is None else _scores(return_scores, shape)
    query, keys, values = operands.views()
    _core.attention(
        query,
        keys,
        values,
        out,
        *operands.options,
        _precision(precision) == "int8",
        scores,
        return_scores or "",
    )
    dtype = operands.arrays[0].dtype
    result = out if dtype == np.float32 else out.astype(dtype)
    return result if scores is None else (result, scores)


def attend_into(
    operands: Operands,
    out: Float32,
    take: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> None:
    """The result of :func:`attention` in float32 into a view with a contiguous last axis.

    ``take`` makes what a device needs beside it; default new arrays.
    """
    if operands.device is None:
        q, k, v = operands.views()
        _core.attention(q, k, v, out, *operands.options, False, None, "")
        return
    from bitnet_ext.gpu.attention import attention as launch

    check_sizes(operands)
    q, k, v = operands.arrays
    launch(operands.device, q, k, v, operands.batch, exact(operands), out, take)


def exact(operands: Operands) -> Any:
    """The options of a device's kernels."""
    from bitnet_ext.gpu.attention import AttentionOptions

    return AttentionOptions(*operands.options, "f32", None)


def check_sizes(operands: Operands) -> None:
    """Those that a device's kernels hold."""
    sizes = operands.arrays[0].shape[-1], operands.arrays[2].shape[-1]
    if not 1 <= sizes[0] <= _MOST_DIMENSIONS >= sizes[1]:
        raise InvalidShapeError(
            f"q, v: found head sizes {sizes[0]} and {sizes[1]}, wanted 1 to {_MOST_DIMENSIONS}"
        )


def worth(operands: Operands, times: int = 1, more: int = 0) -> bool:
    """Whether a device makes the result of arrays of the host sooner.

    Args:
        times: the work, of that of :func:`attention`.
        more: bytes copied beside q, k, v and the result.
    """
    q, k, v = operands.arrays
    rows, (_, _, _, causal, _, left, right, *_) = math.prod(operands.rows), operands.options
    seen = operands.k_len / 2 if causal else operands.k_len
    if left >= 0:
        seen = min(seen, left + 1 + max(right, 0))
    work = times * rows * seen * (q.shape[-1] + v.shape[-1])
    if work < dispatch.LEAST_WORK or "bfloat16" in (a.dtype.name for a in operands.arrays):
        return False
    copied = q.nbytes + k.nbytes + v.nbytes + rows * v.shape[-1] * q.itemsize + more
    return dispatch.pays(dispatch.table(), "attention", work, copied, _core.num_threads())


def _on_device(
    operands: Operands, precision: str, kind: Scores | None
) -> Array | tuple[Array, Float32]:
    """The result as arrays of the device."""
    from bitnet_ext.gpu.attention import AttentionOptions
    from bitnet_ext.gpu.attention import attention as launch

    check_sizes(operands)
    query, keys, values = operands.arrays
    if kind is not None:
        _check_scores(kind)
    options = AttentionOptions(*operands.options, _precision(precision, get_args(Precision)), kind)
    assert operands.device is not None
    out, scores = launch(operands.device, query, keys, values, operands.batch, options)
    result: Array = out
    return result if scores is None else (result, scores)


def _precision(precision: str, known: tuple[str, ...] = ("f32", "int8")) -> str:
    if precision not in known:
        raise InvalidShapeError(f"precision: found {precision!r}, wanted one of {known}")
    return precision


def _scores(kind: str, shape: tuple[int, ...]) -> Float32:
    _check_scores(kind)
    return np.empty(shape, np.float32)


def _check_scores(kind: str) -> None:
    if kind not in _SCORES:
        raise InvalidShapeError(f"return_scores: found {kind!r}, wanted one of {_SCORES}")
