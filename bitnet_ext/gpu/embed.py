"""Embedding rows on a device."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.tables import ELEMENTS, DeviceTable

__all__ = ["embed"]

_KERNELS = {dtype: f"embed<{element}>" for dtype, element in ELEMENTS.items()}
_MODULE = Module("embed.cu", list(_KERNELS.values()))
_BLOCK = (256,)  # as in embed.cu


def embed(
    device: Device,
    table: DeviceTable,
    ids: Any,
    out: Any,
    positions: Any = None,
    at: Any = None,
) -> None:
    """``out[m] = table[ids[m]] + positions[at[m]]``, the second where there are ``positions``.

    Args:
        ids: int32 [M] on the device; one outside the table gives a row of NaN.
        at: int32 [M] on the device, within ``positions``.
        out: float32 [M, E].
        positions: float32 [P, E] or None.
    """
    device.launch(
        _MODULE,
        _KERNELS[table.dtype],
        (len(ids),),
        _BLOCK,
        [
            table.data,
            np.int64(table.data.shape[1]),
            ids,
            positions,
            at,
            out,
            np.int32(len(table.data)),
            np.int32(table.width),
        ],
    )
