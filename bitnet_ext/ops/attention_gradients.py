"""Gradients of scaled dot-product attention over arrays of the caller's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.interchange import kind_of
from bitnet_ext.ops.attention import check_sizes, exact, worth
from bitnet_ext.ops.operands import Array, Operands, Window, bits, operand

__all__ = ["add_gradients", "attention_backward"]

Float32 = npt.NDArray[np.float32]

# Of the work of attention, which has two products: scores and weights are computed again.
_TIMES = 4


def attention_backward(
    d_out: npt.ArrayLike,
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
    device: str = "auto",
) -> tuple[Array, Array, Array]:
    """Gradients of :func:`attention` with respect to q, k and v: ``(dq, dk, dv)``.

    Weights are computed again in blocks of 64 keys, from q, k and v alone (FlashAttention-2,
    arXiv:2307.08691): memory beside the arrays is four numbers for each query. The bits are the
    same in every batch, on every ISA and any number of threads, and on a CUDA device, where q, k, v
    and d_out may be, as for :func:`attention`. NaN or infinity in what a query
    does not see never reaches its gradient, nor does its own NaN reach theirs; a query that sees no
    key has the gradient 0.

    Args:
        d_out: gradient of the result, ``[..., Hq, Tq, Dv]`` in float32, float16 or bfloat16.
        q, k, v, causal, past_len, mask, scale, softcap, window, kv_lengths: as given to
            :func:`attention` with the precision "f32". An additive mask gets no gradient, which
            would be as large as the scores.
        dropout_p, seed: those of the forward call: the same weights are dropped again.
        device: as :func:`attention` takes it.

    Returns:
        Arrays of the shapes and dtypes of q, k and v, summed in float32: over the query heads that
        share a kv head, and over leading axes along which an operand was broadcast.

    Raises:
        InvalidShapeError: as :func:`attention`; a ``d_out`` of another shape than the result's.
        DeviceUnavailableError: as :func:`attention`.
    """
    as_given = kind_of("q", q)
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
    operands = Operands(q, k, v, **options)
    gradient = operand("d_out", d_out, operands.device)
    found = None
    if operands.device is None and device != "cpu":
        found = _by_way_of(device, operands, options, gradient)
    dq, dk, dv = _gradients(operands, gradient) if found is None else found
    return as_given(dq), as_given(dk), as_given(dv)


def _by_way_of(
    device: str, operands: Operands, options: dict[str, Any], d_out: Array
) -> tuple[Array, ...] | None:
    """Those of arrays of the host, made on a device; None: the CPU's turn."""
    arrays = [*operands.arrays, d_out]
    if device == "auto":
        results = sum(array.nbytes for array in operands.arrays)
        if d_out.dtype.name == "bfloat16" or not worth(operands, _TIMES, results):
            return None

    def work(gpu: Device) -> tuple[Array, ...]:
        *there, gradient = (dispatch.send(gpu, array) for array in arrays)
        found = _gradients(Operands(*there, **options), gradient)
        return tuple(dispatch.fetch(gpu, array) for array in found)

    return dispatch.attempt(device, work)


def _gradients(operands: Operands, d_out: Array) -> tuple[Array, ...]:
    """In the shapes and dtypes of q, k and v, where they are."""
    arrays, device = operands.arrays, operands.device
    empty = np.empty if device is None else device.empty
    gradients = [empty(operands.batch + a.shape[-3:], np.float32) for a in arrays]
    dq, dk, dv = gradients
    dk[...], dv[...] = 0, 0
    add_gradients(operands, d_out, dq, dk, dv)
    return tuple(
        _sum_to(gradient, array.shape, device).astype(array.dtype, copy=False)
        for gradient, array in zip(gradients, arrays, strict=True)
    )


def add_gradients(
    operands: Operands,
    d_out: npt.ArrayLike,
    dq: Float32,
    dk: Float32,
    dv: Float32,
    out: Float32 | None = None,
    take: Callable[[str, tuple[int, ...]], Any] | None = None,
) -> None:
    """The gradient of q into ``dq``; those of k and v are added to ``dk`` and ``dv``.

    These have all leading axes, and contiguous last ones.  Parts of the queries in ascending order,
    one call each, add up to the bits of one call. ``out`` receives the result of :func:`attention`,
    which is computed again on the way.  ``take`` makes what a device needs; default new arrays.

    Raises:
        InvalidShapeError: a ``d_out`` of another shape than the result's.
    """
    gradient = operand("d_out", d_out, operands.device)
    if gradient.shape != operands.out_shape:
        raise InvalidShapeError(f"d_out: found {gradient.shape}, wanted {operands.out_shape}")
    if operands.device is not None:
        from bitnet_ext.gpu.attention_backward import attention_backward as launch

        check_sizes(operands)
        arrays, options = (gradient, *operands.arrays), exact(operands)
        launch(operands.device, *arrays, operands.batch, options, (dq, dk, dv), out, take)
        return
    q, k, v = operands.views()
    _core.attention_backward(bits(gradient), q, k, v, dq, dk, dv, out, *operands.options)


def _sum_to(gradient: Float32, shape: tuple[int, ...], device: Device | None) -> Float32:
    """The sum over the leading axes along which an operand of ``shape`` was broadcast, in order."""
    lead = gradient.ndim - len(shape)
    axes = [*range(lead)]
    axes += [lead + i for i, n in enumerate(shape[:-3]) if n == 1 != gradient.shape[lead + i]]
    if not axes:
        return gradient
    others = [axis for axis in range(gradient.ndim) if axis not in axes]
    count, size = math.prod(gradient.shape[axis] for axis in axes), math.prod(shape)
    terms = gradient.transpose(*axes, *others).reshape(count, size)
    empty = np.empty if device is None else device.empty
    ones, sums = empty((count, 1), np.float32), empty((1, size), np.float32)
    ones[...], sums[...] = 1, 0
    if device is None:
        _core.sum_products(ones, terms, sums)
    else:
        from bitnet_ext.gpu.sum_products import sum_products

        sum_products(device, ones, terms, sums)
    return sums.reshape(shape)
