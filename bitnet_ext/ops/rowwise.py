"""Norms and rotary position embedding on arrays, and their gradients.

float32 in, float32 out. float16 is taken too: computed in float32 and rounded once at the end, so
the result has the dtype of ``x``, as ONNX has it. Results have the same bits on every ISA and with
any number of threads; a row's (a token's) never depend on the others. Arrays may have any strides.

Of arrays on a CUDA device, CuPy's or of another library with DLPack, results are made there, with
the same bits, as arrays of that library, and so are gradients; parameters of the host are copied
there. Ids on a device are not read by the host: one without a row in the tables gives NaN.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast, overload

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of, returned_as

__all__ = [
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary_embedding",
    "rotary_embedding_backward",
]

Array = npt.NDArray[Any]  # float32 or float16
Float32 = npt.NDArray[np.float32]


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
    device, given = device_of(x), x
    x, rows = _norm_rows("x", x, axis, device)
    w = _parameter("weight", weight, x, axis, device)
    out = _empty(rows.shape, device)
    if device is None:
        _core.norm(rows, w, None, eps, "rms", out)
        return _as(out, x)
    from bitnet_ext.gpu import rowwise

    rowwise.norm(device, rows, w, None, eps, "rms", out)
    return cast(Array, returned_as(_as(out, x), given))


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
    device, given = device_of(x), x
    x, rows = _norm_rows("x", x, axis, device)
    out = _empty(rows.shape, device)
    mean, inv_std = _empty((2, len(rows)), device)
    w = _parameter("weight", weight, x, axis, device)
    b = _parameter("bias", bias, x, axis, device)
    if device is None:
        _core.norm(rows, w, b, eps, "layer", out, mean, inv_std)
    else:
        from bitnet_ext.gpu import rowwise

        rowwise.norm(device, rows, w, b, eps, "layer", out, mean, inv_std)
    shape = x.shape[:axis] + (1,) * len(x.shape[axis:])
    found = _as(out, x), mean.reshape(shape), inv_std.reshape(shape)
    if device is not None:
        y, centre, spread = (returned_as(array, given) for array in found)
        found = y, centre, spread
    return found if return_stats else found[0]


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


def rotary_embedding(
    x: npt.ArrayLike,
    cos: npt.ArrayLike,
    sin: npt.ArrayLike,
    *,
    position_ids: npt.ArrayLike | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    num_heads: int | None = None,
) -> Array:
    """Rotate pairs of each head by the angles of its position (arXiv:2104.09864).

    Element pairs of the first ``rotary_dim`` of each head turn, the rest is copied::

        y[a] = x[a] cos[i] - x[b] sin[i];  y[b] = x[b] cos[i] + x[a] sin[i]
        (a, b) = (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved

    Args:
        x: float32 or float16 ``[B, H, T, D]``, or ``[B, T, H * D]`` with ``num_heads``.
        cos, sin: ``[P, rotary_dim / 2]`` with ``position_ids``, else ``[B, T, rotary_dim / 2]``.
        position_ids: integers ``[B, T]``, each below P.
        interleaved: which elements make a pair.
        rotary_dim: elements of a head that turn, even; default all of them.
        num_heads: H; needed for a 3-d ``x`` only.

    Returns:
        The shape and dtype of ``x`` (ONNX RotaryEmbedding).

    Raises:
        InvalidShapeError: another dtype, shapes that do not fit, an id out of range.
    """
    return _rotate(
        "x", x, cos, sin, position_ids, interleaved, rotary_dim, num_heads, backward=False
    )


def rotary_embedding_backward(
    grad: npt.ArrayLike,
    cos: npt.ArrayLike,
    sin: npt.ArrayLike,
    *,
    position_ids: npt.ArrayLike | None = None,
    interleaved: bool = False,
    rotary_dim: int | None = None,
    num_heads: int | None = None,
) -> Array:
    """Gradient of ``x`` of :func:`rotary_embedding`: the rotation by the opposite angles.

    Args:
        grad: gradient of the result, in its layout.
        cos, sin, position_ids, interleaved, rotary_dim, num_heads: as given to
            :func:`rotary_embedding`.

    Returns:
        The shape and dtype of ``grad``.

    Raises:
        InvalidShapeError: as :func:`rotary_embedding`.
    """
    return _rotate(
        "grad", grad, cos, sin, position_ids, interleaved, rotary_dim, num_heads, backward=True
    )


def _empty(shape: tuple[int, ...], device: Device | None) -> Float32:
    return cast(
        Float32, np.empty(shape, np.float32) if device is None else device.empty(shape, np.float32)
    )


def _there(name: str, a: npt.ArrayLike, device: Device | None) -> Array:
    """``a`` on the device, or, without one, on the host."""
    found = device_of(a)
    if found is not None:
        if device is None:
            raise InvalidShapeError(f"{name}: found it on a CUDA device, wanted it on the host")
        return cast(Array, device.adopt(a))
    array = np.asarray(a)
    return array if device is None else cast(Array, device.to_device(array))


def _floats(name: str, a: npt.ArrayLike, device: Device | None = None) -> Array:
    array = _there(name, a, device)
    if array.dtype not in (np.float32, np.float16):
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted float32 or float16"
        )
    return array


def _float32(a: Array) -> Float32:
    return a.astype(np.float32, copy=False)


def _as(out: Float32, x: Array) -> Array:
    """The result in the shape and dtype of ``x``."""
    return out.reshape(x.shape).astype(x.dtype, copy=False)


def _norm_rows(
    name: str, a: npt.ArrayLike, axis: int, device: Device | None = None
) -> tuple[Array, Float32]:
    """The array, and its float32 rows [., product of the axes from ``axis`` on]."""
    x = _floats(name, a, device)
    if not -x.ndim <= axis < x.ndim:
        raise InvalidShapeError(f"axis: found {axis}, wanted an axis of {name} {x.shape}")
    split = axis % x.ndim
    shape = math.prod(x.shape[:split]), math.prod(x.shape[split:])
    rows = _float32(x).reshape(shape)
    return x, _rows_contiguous(rows) if device is None else device.rows_contiguous(rows)


def _rows_contiguous(a: Float32) -> Float32:
    """``a``, copied unless its last axis is contiguous and the others lie ahead of each other."""
    whole = all(stride % a.itemsize == 0 for stride in a.strides)
    if a.ndim == 2:
        whole = whole and (len(a) < 2 or a.strides[0] >= a.shape[1] * a.itemsize)
    return a if whole and a.strides[-1] == a.itemsize else np.ascontiguousarray(a)


def _parameter(
    name: str, a: npt.ArrayLike | None, x: Array, axis: int, device: Device | None = None
) -> Float32 | None:
    if a is None:
        return None
    array = _floats(name, a, device)
    if array.shape != x.shape[axis:]:
        raise InvalidShapeError(f"{name}: found {array.shape}, wanted {x.shape[axis:]}")
    if device is not None:
        return cast(Float32, device.rows_contiguous(_float32(array).reshape(-1)))
    return np.ascontiguousarray(_float32(array)).reshape(-1)


def _norm_backward(
    kind: Literal["rms", "layer"],
    grad: npt.ArrayLike,
    x: npt.ArrayLike,
    weight: npt.ArrayLike | None,
    eps: float,
    axis: int,
) -> tuple[Array, Float32, Float32]:
    device, given = device_of(x), x
    x, rows = _norm_rows("x", x, axis, device)
    dy, grads = _norm_rows("grad", grad, axis, device)
    if dy.shape != x.shape:
        raise InvalidShapeError(f"grad: found {dy.shape}, wanted the shape of x, {x.shape}")
    grad_x, (grad_weight, grad_bias) = (
        _empty(rows.shape, device),
        _empty((2, rows.shape[1]), device),
    )
    w = _parameter("weight", weight, x, axis, device)
    shape = x.shape[axis:]
    if device is None:
        _core.norm_backward(grads, rows, w, eps, kind, grad_x, grad_weight, grad_bias)
    else:
        from bitnet_ext.gpu.norm_backward import norm_backward

        norm_backward(device, grads, rows, w, eps, kind, grad_x, grad_weight, grad_bias)
    found = _as(grad_x, x), grad_weight.reshape(shape), grad_bias.reshape(shape)
    if device is None:
        return found
    return cast(
        "tuple[Array, Float32, Float32]", tuple(returned_as(array, given) for array in found)
    )


def _rotate(
    name: str,
    x: npt.ArrayLike,
    cos: npt.ArrayLike,
    sin: npt.ArrayLike,
    position_ids: npt.ArrayLike | None,
    interleaved: bool,
    rotary_dim: int | None,
    num_heads: int | None,
    *,
    backward: bool,
) -> Array:
    device, given = device_of(x), x
    x = _floats(name, x, device)
    heads = _heads(x, num_heads)
    cosines, sines, ids = _angles(heads, cos, sin, position_ids, rotary_dim, device)
    out = _empty(x.shape, device)
    view = _heads(out, num_heads)
    if device is None:
        if backward:
            sines = -sines
        _core.rotary(_rows_contiguous(_float32(heads)), cosines, sines, ids, interleaved, view)
        return _as(out, x)
    from bitnet_ext.gpu import rowwise

    whole = device.rows_contiguous(_float32(heads))
    rowwise.rotary(device, whole, cosines, sines, ids, interleaved, view, backward=backward)
    return cast(Array, returned_as(_as(out, x), given))


def _heads(x: Array, num_heads: int | None) -> Array:
    """A view [B, H, T, D] of either layout."""
    if x.ndim == 4 and num_heads in (None, x.shape[1]):
        return x
    if x.ndim == 4:
        raise InvalidShapeError(f"num_heads: found {num_heads}, wanted {x.shape[1]}, that of x")
    if x.ndim != 3:
        raise InvalidShapeError(f"x: found {x.shape}, wanted [B, H, T, D] or [B, T, H * D]")
    if num_heads is None or num_heads < 1 or x.shape[2] % num_heads:
        raise InvalidShapeError(
            f"num_heads: found {num_heads}, wanted a divisor of the last axis of x {x.shape}"
        )
    split = x.reshape(*x.shape[:2], num_heads, x.shape[2] // num_heads)
    return split.transpose(0, 2, 1, 3)


def _angles(
    heads: Array,
    cos: npt.ArrayLike,
    sin: npt.ArrayLike,
    position_ids: npt.ArrayLike | None,
    rotary_dim: int | None,
    device: Device | None,
) -> tuple[Float32, Float32, npt.NDArray[np.int64] | None]:
    """The tables as contiguous [rows, rotary_dim / 2], and the row of each token."""
    batch, _, tokens, size = heads.shape
    dim = size if rotary_dim is None else rotary_dim
    if not (2 <= dim <= size or dim == size == 0) or dim % 2:
        raise InvalidShapeError(f"rotary_dim: found {dim}, wanted an even number up to {size}")
    tables = {"cos": _floats("cos", cos, device), "sin": _floats("sin", sin, device)}
    ids = None
    if position_ids is not None:
        ids = _there("position_ids", position_ids, device)
        if ids.dtype.kind not in "iu" or ids.shape != (batch, tokens):
            raise InvalidShapeError(
                f"position_ids: found {ids.dtype} {ids.shape}, wanted integers {(batch, tokens)}"
            )
    shape: tuple[int, ...] = (batch, tokens, dim // 2)
    if ids is not None:
        shape = (len(tables["cos"]) if tables["cos"].ndim else 0, dim // 2)
    for name, table in tables.items():
        if table.shape != shape:
            raise InvalidShapeError(f"{name}: found {table.shape}, wanted {shape}")
    flat = math.prod(shape[:-1]), dim // 2
    if device is not None:
        copies = [device.empty(flat, np.float32) for _ in tables]
        for copy, table in zip(copies, tables.values(), strict=True):
            copy[...] = table.reshape(flat)
        copied = None if ids is None else device.rows_contiguous(ids.astype(np.int64).reshape(-1))
        return copies[0], copies[1], copied
    cosines, sines = (
        np.ascontiguousarray(_float32(table)).reshape(flat) for table in tables.values()
    )
    rows = None if ids is None else np.ascontiguousarray(ids, np.int64).reshape(-1)
    return cosines, sines, rows
