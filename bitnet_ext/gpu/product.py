"""What every kernel of ternary products takes: the operands and what becomes of the sums."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.quantise import Activations
from bitnet_ext.gpu.weight import DeviceTernary

__all__ = ["Gate", "Product", "SplitRoom", "shares"]

Gate = Literal["none", "relu2", "silu"]

# As epilogue.cuh numbers them; bfloat16 travels as its bits.
_OUTPUTS = [np.dtype(kind) for kind in (np.int32, np.float32, np.float16, np.uint16)]
_GATES: tuple[Gate, ...] = ("none", "relu2", "silu")


_LEAST_UNITS = 4  # blocks of k of a block's share: less than the sharing costs


@dataclass(frozen=True)
class SplitRoom:
    """Scratch of products whose blocks share tiles (share.cuh), of one stream's launches.

    Attributes:
        sums: int32, of pieces of tiles.
        tickets: int32, zero between launches.
    """

    sums: Any
    tickets: Any

    @classmethod
    def empty(cls, device: Device, blocks: int, tile: int) -> SplitRoom:
        """For ``blocks`` blocks and tiles of ``tile`` sums."""
        tickets = device.empty((blocks,), np.int32)
        tickets.fill(0)
        return cls(device.empty((2 * blocks * tile,), np.int32), tickets)


def shares(tiles: int, blocks_of_k: int, room: SplitRoom | None, resident: int) -> int:
    """Blocks of a grid: as many as the device holds at once, where their work can be shared."""
    if room is None:
        return tiles
    return min(resident, max(tiles, tiles * blocks_of_k // _LEAST_UNITS))


@dataclass(frozen=True)
class Product:
    """``out`` = the rows of ``x`` times ``weight``, then epilogue.cuh.

    Attributes:
        out: int32 (the integers themselves), float32, float16 or, as uint16, bfloat16: [rows, n],
            or [rows, n / 2] with a gate; rows any distance apart.
        bias: float32 in the layout's order (``weight.in_order``), or None.
        residual: float32 of the shape and strides of ``out``, added last, or None; may be ``out``.
        split: lets blocks share the tiles of many rows; None: each has tiles of its own.
    """

    x: Activations
    weight: DeviceTernary
    out: Any
    bias: Any = None
    residual: Any = None
    gate: Gate = "none"
    split: SplitRoom | None = None

    @property
    def args(self) -> list[Any]:
        """The kernel's arguments."""
        x, w = self.x, self.weight
        return [w.words, x.q, np.int32(w.blocks), *self.epilogue(x.sums, x.scales)]

    @property
    def split_args(self) -> list[Any]:
        """The arguments of a kernel whose blocks may share tiles."""
        words, q, blocks, *rest = self.args
        room = self.split
        held = (None, None) if room is None else (room.sums, room.tickets)
        return [words, q, blocks, *held, *rest]

    def epilogue(self, sums: Any, scales: Any) -> list[Any]:
        """Those of epilogue.cuh."""
        w, out = self.weight, self.out
        numbers = (
            *(_OUTPUTS.index(out.dtype), _GATES.index(self.gate)),
            *(w.divide, self.x.rows, w.shape[0]),
        )
        return [
            *(out, sums, scales, w.scale, self.bias, self.residual),
            np.int64(out.strides[0] // out.itemsize),
            *map(np.int32, numbers),
        ]
