"""What every kernel of ternary products takes: the operands and what becomes of the sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bitnet_ext.gpu.quantise import Activations
from bitnet_ext.gpu.weight import DeviceTernary

__all__ = ["Gate", "Product"]

Gate = Literal["none", "relu2", "silu"]

# As epilogue.cuh numbers them; bfloat16 travels as its bits.
_OUTPUTS = [np.dtype(kind) for kind in (np.int32, np.float32, np.float16, np.uint16)]
_GATES: tuple[Gate, ...] = ("none", "relu2", "silu")


@dataclass(frozen=True)
class Product:
    """``out`` = the rows of ``x`` times ``weight``, then epilogue.cuh.

    Attributes:
        out: int32 (the integers themselves), float32, float16 or, as uint16, bfloat16: [rows, n],
            or [rows, n / 2] with a gate; rows any distance apart.
        bias: float32 in the layout's order (``weight.in_order``), or None.
        residual: float32 of the shape and strides of ``out``, added last, or None; may be ``out``.
    """

    x: Activations
    weight: DeviceTernary
    out: Any
    bias: Any = None
    residual: Any = None
    gate: Gate = "none"

    @property
    def args(self) -> list[Any]:
        """The kernel's arguments."""
        x, w, out = self.x, self.weight, self.out
        numbers = (_OUTPUTS.index(out.dtype), _GATES.index(self.gate), w.divide, x.rows, w.shape[0])
        return [
            *(w.words, x.q, np.int32(w.blocks)),
            *(out, x.sums, x.scales, w.scale, self.bias, self.residual),
            np.int64(out.strides[0] // out.itemsize),
            *map(np.int32, numbers),
        ]
