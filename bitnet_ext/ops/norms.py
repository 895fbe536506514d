"""Norms on arrays, and their gradients.

float32 in, float32 out. float16 is taken too: computed in float32 and rounded once at the end, so
the result has the dtype of ``x``, as ONNX has it. Results have the same bits on every ISA and with
any number of threads; a row's (a token's) never depend on the others. Arrays may have any strides.

Arrays may be of NumPy, CuPy or another library with DLPack; results and gradients are of the
library of ``x``. Of an ``x`` on a CUDA device they are made there, with the same bits; parameters
of the host are copied there. Arrays of the host stay there: memory bounds the work, so a copy over
a link would never pay.
"""

from __future__ import annotations

import math
from typing import Literal, cast, overload

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import kind_of
from bitnet_ext.ops.floats import (
    Array,
    Float32,
    as_float32,
    empty,
    floats,
    rows_contiguous,
    shaped_as,
)

__all__ = ["layer_norm", "layer_norm_backward", "rms_norm", "rms_norm_backward"]


def rms_norm(
    x: npt.ArrayLike, weight: npt.ArrayLike | None, *, eps: float = 1e-5, axis: int = -1
) -> Array:
    """``x / sqrt(mean(x**2) + eps) * weight`` over the axes from ``axis`` to the last.

    Root mean square norm (arXiv:1910.07467; ONNX RMSNormalization).

    Args:
        x: float32 or float16, at least one axis.
        weight: ``x.shape[axis:]``, or None for ones.
        eps: added to the mean square.
        axis: the first of the normalised axes.

    Returns:
        The shape and dtype of ``x``.

    Raises:
        InvalidShapeError: another dtype, an axis that ``x`` lacks, a weight of another shape.
    """
    device, as_given = device_of(x), kind_of("x", x)
    x, rows = _norm_rows("x", x, axis, device)
    w = _parameter("weight", weight, x, axis, device)
    out = empty(rows.shape, device)
    _norm(device, rows, w, None, eps, "rms", out)
    return as_given(shaped_as(out, x))


@overload
def layer_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = -1,
    return_stats: Literal[False] = False,
) -> Array: ...
@overload
def layer_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = -1,
    return_stats: Literal[True],
) -> tuple[Array, Float32, Float32]: ...
def layer_norm(
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    bias: npt.ArrayLike | None = None,
    *,
    eps: float = 1e-5,
    axis: int = -1,
    return_stats: bool = False,
) -> Array | tuple[Array, Float32, Float32]:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the axes from ``axis`` on.

    Layer norm (arXiv:1607.06450; ONNX LayerNormalization) with the biased variance.

    Args:
        x: float32 or float16, at least one axis.
        weight, bias: ``x.shape[axis:]``, or None for ones and zeros.
        eps: added to the variance.
        axis: the first of the normalised axes.
        return_stats: also return ``mean`` and ``inv_std = 1 / sqrt(variance + eps)``, float32,
            with the shape of ``x`` and 1 for each normalised axis.

    Returns:
        The shape and dtype of ``x``; ``(y, mean, inv_std)`` with ``return_stats``.

    Raises:
        InvalidShapeError: another dtype, an axis that ``x`` lacks, parameters of another shape.
    """
    device, as_given = device_of(x), kind_of("x", x)
    x, rows = _norm_rows("x", x, axis, device)
    out = empty(rows.shape, device)
    mean, inv_std = empty((2, len(rows)), device)
    w = _parameter("weight", weight, x, axis, device)
    b = _parameter("bias", bias, x, axis, device)
    _norm(device, rows, w, b, eps, "layer", out, mean, inv_std)
    shape = x.shape[:axis] + (1,) * len(x.shape[axis:])
    y = as_given(shaped_as(out, x))
    if not return_stats:
        return y
    return y, as_given(mean.reshape(shape)), as_given(inv_std.reshape(shape))


def rms_norm_backward(
    grad: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    *,
    eps: float = 1e-5,
    axis: int = -1,
) -> tuple[Array, Float32]:
    """Gradients of :func:`rms_norm`: ``(grad_x, grad_weight)``.

    Args:
        grad: gradient of the result, the shape of ``x``.
        x, weight, eps, axis: as given to :func:`rms_norm`; statistics are computed again.

    Returns:
        ``grad_x`` with the shape and dtype of ``x``; ``grad_weight`` float32 ``x.shape[axis:]``,
        summed over the rows in one fixed order.

    Raises:
        InvalidShapeError: as :func:`rms_norm`, or a ``grad`` of another shape.
    """
    grad_x, grad_weight, _ = _norm_backward("rms", grad, x, weight, eps, axis)
    return grad_x, grad_weight


def layer_norm_backward(
    grad: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    *,
    eps: float = 1e-5,
    axis: int = -1,
) -> tuple[Array, Float32, Float32]:
    """Gradients of :func:`layer_norm`: ``(grad_x, grad_weight, grad_bias)``.

    Args:
        grad: gradient of the result, the shape of ``x``.
        x, weight, eps, axis: as given to :func:`layer_norm`; statistics are computed again.

    Returns:
        ``grad_x`` with the shape and dtype of ``x``; the others float32 ``x.shape[axis:]``,
        summed over the rows in one fixed order.

    Raises:
        InvalidShapeError: as :func:`layer_norm`, or a ``grad`` of another shape.
    """
    return _norm_backward("layer", grad, x, weight, eps, axis)


def _norm_rows(
    name: str, a: npt.ArrayLike, axis: int, device: Device | None = None
) -> tuple[Array, Float32]:
    """The array, and its float32 rows [., product of the axes from ``axis`` on]."""
    x = floats(name, a, device)
    if not -x.ndim <= axis < x.ndim:
        raise InvalidShapeError(f"axis: found {axis}, wanted an axis of {name} {x.shape}")
    split = axis % x.ndim
    shape = math.prod(x.shape[:split]), math.prod(x.shape[split:])
    rows = as_float32(x).reshape(shape)
    return x, rows_contiguous(rows) if device is None else device.rows_contiguous(rows)


def _parameter(
    name: str, a: npt.ArrayLike | None, x: Array, axis: int, device: Device | None = None
) -> Float32 | None:
    if a is None:
        return None
    array = floats(name, a, device)
    if array.shape != x.shape[axis:]:
        raise InvalidShapeError(f"{name}: found {array.shape}, wanted {x.shape[axis:]}")
    if device is not None:
        return cast(Float32, device.rows_contiguous(as_float32(array).reshape(-1)))
    return np.ascontiguousarray(as_float32(array)).reshape(-1)


def _norm(
    device: Device | None,
    rows: Float32,
    weight: Float32 | None,
    bias: Float32 | None,
    eps: float,
    kind: Literal["rms", "layer"],
    *results: Float32,
) -> None:
    """The norm of rows into ``results``: itself, and where wanted means and inverse deviations."""
    if device is None:
        _core.norm(rows, weight, bias, eps, kind, *results)
        return
    from bitnet_ext.gpu import rowwise

    rowwise.norm(device, rows, weight, bias, eps, kind, *results)


def _norm_backward(
    kind: Literal["rms", "layer"],
    grad: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    eps: float,
    axis: int,
) -> tuple[Array, Float32, Float32]:
    device, as_given = device_of(x), kind_of("x", x)
    x, rows = _norm_rows("x", x, axis, device)
    dy, grads = _norm_rows("grad", grad, axis, device)
    if dy.shape != x.shape:
        raise InvalidShapeError(f"grad: found {dy.shape}, wanted the shape of x, {x.shape}")
    grad_x, (grad_weight, grad_bias) = (
        empty(rows.shape, device),
        empty((2, rows.shape[1]), device),
    )
    w = _parameter("weight", weight, x, axis, device)
    shape = x.shape[axis:]
    if device is None:
        _core.norm_backward(grads, rows, w, eps, kind, grad_x, grad_weight, grad_bias)
    else:
        from bitnet_ext.gpu.norm_backward import norm_backward

        norm_backward(device, grads, rows, w, eps, kind, grad_x, grad_weight, grad_bias)
    parameters = as_given(grad_weight.reshape(shape)), as_given(grad_bias.reshape(shape))
    return as_given(shaped_as(grad_x, x)), *parameters
