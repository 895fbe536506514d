"""Products with ternary matrices, exact in integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext._core import PackedTernary
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import device_of, returned_as

__all__ = ["PackedTernary", "ternary_linear", "ternary_matmul"]

Float32 = npt.NDArray[np.float32]


def ternary_matmul(q: npt.NDArray[np.int8], weight: PackedTernary) -> npt.NDArray[np.int32]:
    """``q @ weight.T`` in integers, exact: int8 [M, K] with a packed [N, K] -> int32 [M, N].

    The weight's scale takes no part.  ``q`` may be an array on the current CUDA device, CuPy's or
    of another library with DLPack: the product is made there and comes back as the same kind.  The
    first such call brings the weight to the device, where it stays as long as it lives.

    Raises:
        InvalidShapeError: ``q`` is not int8 [M, K] with the weight's K.
        DeviceUnavailableError: ``q`` is on a CUDA device that CuPy cannot use.
    """
    if (device := device_of(q)) is not None:
        from bitnet_ext.gpu import ternary

        found: npt.NDArray[np.int32] = returned_as(
            ternary.matmul(device, device.adopt(q), weight), q
        )
        return found
    q = _rows_contiguous(np.asarray(q))
    out = np.empty((len(q) if q.ndim else 0, weight.shape[0]), np.int32)
    _core.ternary_matmul(q, weight, out)
    return out


def ternary_linear(x: Float32, weight: PackedTernary, bias: npt.ArrayLike | None = None) -> Float32:
    """A BitNet linear layer: float32 [..., K] with a packed [N, K] -> float32 [..., N].

    Each token (last axis) is quantised as in training (arXiv:2402.17764), then multiplied
    exactly::

        s = 127 / max(max|x|, 1e-5);  q = clamp(rint(x s), -128, 127);  acc = q @ weight.T
        y = (acc / s) * weight.scale,  or acc / (weight.scale * s) when weight.divide;  y += bias

    Ties round to even.  The result has the same bits on every ISA, on a CUDA device and in every
    batch.  Arrays on a device: as :func:`ternary_matmul`.

    Raises:
        InvalidShapeError: ``x`` is not float32 with the weight's K last, or ``bias`` not [N].
        DeviceUnavailableError: ``x`` is on a CUDA device that CuPy cannot use.
    """
    if (device := device_of(x)) is not None:
        from bitnet_ext.gpu import ternary

        if device_of(bias) is not None:
            bias = device.adopt(bias)
        found: Float32 = returned_as(ternary.linear(device, device.adopt(x), weight, bias), x)
        return found
    x = np.asarray(x)
    n, k = weight.shape
    if x.dtype != np.float32 or x.ndim == 0 or x.shape[-1] != k:
        raise InvalidShapeError(f"x: found {x.dtype} {x.shape}, wanted float32 [..., {k}]")
    rows = _rows_contiguous(x.reshape(math.prod(x.shape[:-1]), k))
    q, s = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    _core.norm_quant(rows, None, None, 0.0, "none", q, s)
    out = np.empty((len(q), n), np.float32)
    if bias is not None:
        bias = np.ascontiguousarray(bias, np.float32)
    _core.ternary_linear(q, s, weight, bias, False, out)
    return out.reshape(*x.shape[:-1], n)


def _rows_contiguous(a: npt.NDArray[Any]) -> npt.NDArray[Any]:
    return a if a.ndim == 2 and a.strides[1] == a.itemsize else np.ascontiguousarray(a)
