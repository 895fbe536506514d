"""Multi-head attention on arrays of the host by way of a device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.interchange import host_array
from bitnet_ext.ops.multi_head_place import Array

if TYPE_CHECKING:
    from bitnet_ext.ops.multi_head import MultiHeadAttention

__all__ = ["by_way_of"]


def by_way_of(
    device: str, module: MultiHeadAttention, x: Any, x_kv: Any, keeps: bool, options: dict[str, Any]
) -> Array | None:
    """The result of a call, made on a device; None: the CPU's turn.

    Args:
        device: "cuda" or "auto".
        keeps: the call reads or leaves something where it works.
        options: of the call, beside x and x_kv.

    Raises:
        InvalidShapeError: ``keeps`` with "cuda".
        DeviceUnavailableError: "cuda" and not there, or no device's name.
    """
    dispatch.check(device)
    if keeps:
        if device == "cuda":
            raise InvalidShapeError(
                "device: found 'cuda' for arrays of the host with a cache, out or training, which "
                "stay where x is, wanted an x on the device"
            )
        return None
    arrays = [host_array(n, a) for n, a in (("x", x), ("x_kv", x_kv)) if a is not None]
    if device == "auto" and not _worth(module, arrays[0], arrays[-1], options["causal"]):
        return None

    def work(gpu: Device) -> Array:
        there = [dispatch.send(gpu, array) for array in arrays]
        return dispatch.fetch(gpu, module(*there, **options))

    return dispatch.attempt(device, work)


def _worth(module: MultiHeadAttention, x: Array, source: Array, causal: bool) -> bool:
    """Whether a device makes the result sooner: the estimate of attention, with the projections."""
    if min(x.ndim, source.ndim) < 2:
        return False
    m, pair = module, module.d_k + module.d_v
    rows, keys = math.prod(x.shape[:-1]), math.prod(source.shape[:-1])
    weights = m.num_heads * (m.d_k * m.embed_dim + m.d_v * m.out_dim)
    work = rows * weights + keys * m.kv_heads * pair * m.embed_dim
    work += rows * source.shape[-2] * m.num_heads * pair // (2 if causal else 1)
    if work < dispatch.LEAST_WORK:
        return False
    copied = sum(a.nbytes for a in {id(a): a for a in (x, source)}.values())
    copied += rows * m.out_dim * x.itemsize + m._unsent_bytes
    return dispatch.pays(dispatch.table(), "attention", work, copied, _core.num_threads())
