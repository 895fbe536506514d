"""Activations of rows on a device, with the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["activate"]

_KERNELS = {
    "relu2": "activate<kRelu2>",
    "silu": "activate<kSilu>",
    "gelu": "activate<kGelu>",
    "gelu_tanh": "activate<kGeluTanh>",
}
_MODULE = Module("activate.cu", list(_KERNELS.values()))
_BLOCK = (256,)  # as in activate.cu
_MOST_STEPS = 64


def activate(device: Device, x: Any, out: Any, kind: str, gated: bool) -> None:
    """``out = act(x)`` or, ``gated``, ``act(x[:, :I]) * x[:, I:]``.

    Args:
        x: float32 [M, I], or [M, 2 I] where ``gated``.
        out: float32 [M, I].
        kind: "relu2", "silu", "gelu" or "gelu_tanh".
    """
    rows, width = out.shape
    steps = min(-(-width // _BLOCK[0]), _MOST_STEPS)
    device.launch(
        _MODULE,
        _KERNELS[kind],
        (rows, steps),
        _BLOCK,
        [out, x, np.int32(width), np.int32(gated)],
    )
