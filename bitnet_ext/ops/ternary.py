"""Products with ternary matrices, exact in integers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext._core import PackedTernary
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import host_array, kind_of
from bitnet_ext.ops.floats import rows_contiguous

__all__ = ["PackedTernary", "ternary_linear", "ternary_matmul"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]


def ternary_matmul(
    q: npt.NDArray[np.int8], weight: PackedTernary, *, device: str = "auto"
) -> npt.NDArray[np.int32]:
    """``q @ weight.T`` in integers, exact: int8 [M, K] with a packed [N, K] -> int32 [M, N].

    The weight's scale takes no part.  ``q`` may be an array of NumPy, CuPy or another library with
    DLPack, the result is of the same kind, made where ``q`` is.  The first call on a CUDA device
    brings the weight there, where it stays as long as it lives.

    Args:
        device: where the product of a host's array is made, "cpu", "cuda" (copied there and back),
            or "auto": on a device that is there, if that is faster by ``gpu/dispatch.py``'s table.

    Raises:
        InvalidShapeError: ``q`` is not int8 [M, K] with the weight's K.
        DeviceUnavailableError: ``q`` is on a CUDA device that CuPy cannot use, or ``device`` is
            not there.
    """
    as_given = kind_of("q", q)
    if (place := device_of(q)) is not None:
        from bitnet_ext.gpu import ternary

        found: Int32 = ternary.matmul(place, place.adopt(q), weight)
        return as_given(found)
    rows = host_array("q", q)
    if rows.ndim == 2:
        rows = rows_contiguous(rows)
    if device != "cpu" and (device != "auto" or _worth(rows, weight)):
        from bitnet_ext.gpu import ternary

        def by_way_of(gpu: Device) -> Int32:
            return dispatch.fetch(gpu, ternary.matmul(gpu, dispatch.send(gpu, rows), weight))

        if (product := dispatch.attempt(device, by_way_of)) is not None:
            return as_given(product)
    out = np.empty((len(rows) if rows.ndim else 0, weight.shape[0]), np.int32)
    _core.ternary_matmul(rows, weight, out)
    return as_given(out)


def ternary_linear(
    x: Float32,
    weight: PackedTernary,
    bias: npt.ArrayLike | None = None,
    *,
    device: str = "auto",
) -> Float32:
    """A BitNet linear layer: float32 [..., K] with a packed [N, K] -> float32 [..., N].

    Each token (last axis) is quantised as in training (arXiv:2402.17764), then multiplied
    exactly::

        s = 127 / max(max|x|, 1e-5);  q = clamp(rint(x s), -128, 127);  acc = q @ weight.T
        y = (acc / s) * weight.scale,  or acc / (weight.scale * s) when weight.divide;  y += bias

    Ties round to even.  The result has the same bits on every ISA, on a CUDA device and in every
    batch.  Arrays on a device, and ``device`` for those of the host: as :func:`ternary_matmul`.

    Raises:
        InvalidShapeError: ``x`` is not float32 with the weight's K last, or ``bias`` not [N].
        DeviceUnavailableError: ``x`` is on a CUDA device that CuPy cannot use, or ``device`` is
            not there.
    """
    as_given = kind_of("x", x)
    if (place := device_of(x)) is not None:
        from bitnet_ext.gpu import ternary

        if bias is not None:
            bias = place.adopt(bias) if device_of(bias) is not None else host_array("bias", bias)
        found: Float32 = ternary.linear(place, place.adopt(x), weight, bias)
        return as_given(found)
    array = host_array("x", x)
    if bias is not None:
        bias = np.require(host_array("bias", bias), np.float32, ["C", "A"])
    n, k = weight.shape
    if array.dtype != np.float32 or array.ndim == 0 or array.shape[-1] != k:
        raise InvalidShapeError(f"x: found {array.dtype} {array.shape}, wanted float32 [..., {k}]")
    rows = rows_contiguous(array.reshape(math.prod(array.shape[:-1]), k))
    if device != "cpu" and (device != "auto" or _worth(rows, weight)):
        from bitnet_ext.gpu import ternary

        def by_way_of(gpu: Device) -> Float32:
            return dispatch.fetch(gpu, ternary.linear(gpu, dispatch.send(gpu, rows), weight, bias))

        if (product := dispatch.attempt(device, by_way_of)) is not None:
            return as_given(product.reshape(*array.shape[:-1], n))
    q, s = np.empty(rows.shape, np.int8), np.empty(len(rows), np.float32)
    _core.norm_quant(rows, None, None, 0.0, "none", q, s)
    out = np.empty((len(q), n), np.float32)
    _core.ternary_linear(q, s, weight, bias, False, out)
    return as_given(out.reshape(*array.shape[:-1], n))


def _worth(rows: npt.NDArray[Any], weight: PackedTernary) -> bool:
    """Whether a device makes the product of rows of the host sooner."""
    n, k = weight.shape
    work = rows.size * n
    if work < dispatch.LEAST_WORK:
        return False
    copied = rows.nbytes + 4 * rows.size // max(k, 1) * n
    costs, threads = dispatch.table(), _core.num_threads()
    if not dispatch.pays(costs, "ternary", work, copied, threads):
        return False
    from bitnet_ext.gpu import ternary

    codes = 0 if ternary.held(weight) else n * k  # int8, once
    return dispatch.pays(costs, "ternary", work, copied + codes, threads)
