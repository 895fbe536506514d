"""Rotary position embedding on arrays, and its gradient.

Dtypes, bits and devices are those of the norms (norms.py). Ids on a device are not read by the
host: one without a row in the tables gives NaN.
"""

from __future__ import annotations

import math

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
    on_device,
    rows_contiguous,
    shaped_as,
)

__all__ = ["rotary_embedding", "rotary_embedding_backward"]


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
    device, as_given = device_of(x), kind_of(name, x)
    x = floats(name, x, device)
    heads = _heads(x, num_heads)
    cosines, sines, ids = _angles(heads, cos, sin, position_ids, rotary_dim, device)
    out = empty(x.shape, device)
    view = _heads(out, num_heads)
    if device is None:
        if backward:
            sines = -sines
        _core.rotary(rows_contiguous(as_float32(heads)), cosines, sines, ids, interleaved, view)
        return as_given(shaped_as(out, x))
    from bitnet_ext.gpu import rowwise

    whole = device.rows_contiguous(as_float32(heads))
    rowwise.rotary(device, whole, cosines, sines, ids, interleaved, view, backward=backward)
    return as_given(shaped_as(out, x))


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
    tables = {"cos": floats("cos", cos, device), "sin": floats("sin", sin, device)}
    ids = None
    if position_ids is not None:
        ids = on_device("position_ids", position_ids, device)
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
        np.ascontiguousarray(as_float32(table)).reshape(flat) for table in tables.values()
    )
    rows = None if ids is None else np.ascontiguousarray(ids, np.int64).reshape(-1)
    return cosines, sines, rows
