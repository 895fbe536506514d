"""Tables over the vocabulary on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.gpu.device import Device

__all__ = ["ELEMENTS", "DeviceTable", "Element"]

Element = Literal["f32", "f16", "bf16", "int8"]

# How kernels name the elements.
ELEMENTS = {
    "f32": "float",
    "f16": "half_t",
    "bf16": "bfloat_t",
    "int8": "int8_t",
}

_MULTIPLE = 16  # elements of a row: whole steps of the sixteen chains, and whole 16 bytes


@dataclass(frozen=True)
class DeviceTable:
    """Rows as a checkpoint stores them, each padded with zeros to a multiple of 16 elements."""

    data: Any  # [V, stride]
    dtype: Element
    width: int
    scales: Any  # float32 [V] for int8, or None

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return int(self.data.nbytes) + (0 if self.scales is None else int(self.scales.nbytes))

    @classmethod
    def upload(
        cls,
        device: Device,
        data: npt.NDArray[Any],
        dtype: Element,
        scales: npt.NDArray[np.float32] | None = None,
    ) -> DeviceTable:
        """Copy a table [V, E] to the device."""
        rows, width = data.shape
        if width % _MULTIPLE:
            padded = np.zeros((rows, -(-width // _MULTIPLE) * _MULTIPLE), data.dtype)
            padded[:, :width] = data
            data = padded
        return cls(
            device.to_device(np.ascontiguousarray(data)),
            dtype,
            width,
            None if scales is None else device.to_device(scales),
        )

    def download(self, device: Device) -> npt.NDArray[Any]:
        """The table [V, E] on the host again."""
        return np.ascontiguousarray(device.to_host(self.data)[:, : self.width])

    @classmethod
    def of(cls, device: Device, rows: Any) -> DeviceTable:
        """Of float32 [V, E] on the device: itself where its rows are whole, else a copy."""
        count, width = rows.shape
        wide = -(-width // _MULTIPLE) * _MULTIPLE
        if wide == width and rows.flags.c_contiguous:
            return cls(rows, "f32", width, None)
        padded = device.empty((count, wide), np.float32)
        padded[:, width:] = 0
        padded[:, :width] = rows
        return cls(padded, "f32", width, None)

    def first(self, rows: int) -> DeviceTable:
        """The first rows, a view."""
        scales = None if self.scales is None else self.scales[:rows]
        return DeviceTable(self.data[:rows], self.dtype, self.width, scales)
