"""Rows of activations as int8, normed on the way, in the layouts that ternary products read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["KINDS", "Activations", "NormRows", "arrange", "norm_quantise"]

NormKind = Literal["none", "rms", "layer"]

BLOCK_K = 128
TILE_ROWS = 128  # of the tiled layout
_THREADS = 256
_MAX_WIDTH = 99 * 1024 // 4 - 256  # floats of a row in shared memory
MOST_ROWS = 4  # of a block, as in quantise_rows.cuh

KINDS: tuple[NormKind, ...] = ("none", "rms", "layer")
_MODULE = Module(
    "quantise.cu",
    [f"norm_quantise<{i}, {t}>" for i in range(len(KINDS)) for t in ("false", "true")]
    + [f"arrange<{t}>" for t in ("false", "true")],
)


@dataclass(frozen=True)
class Activations:
    """Room for the quantised rows of a product; what a launcher fills and another reads.

    Attributes:
        q: int8, plain [rows, width] or tiled [ceil(rows / 128), width / 128, 128, 128], where
            width is k in whole blocks of 128.
        scales, sums: float32 and int32 [rows].
        tiled: which of the two (quantise.cu).
    """

    q: Any
    scales: Any
    sums: Any
    rows: int
    k: int
    tiled: bool

    @classmethod
    def empty(cls, device: Device, rows: int, k: int, tiled: bool) -> Activations:
        """Room for ``rows`` rows of ``k``, undefined."""
        width = -(-k // BLOCK_K) * BLOCK_K
        shape: tuple[int, ...] = (rows, width)
        if tiled:
            shape = (-(-rows // TILE_ROWS), width // BLOCK_K, TILE_ROWS, BLOCK_K)
        q = device.empty(shape, np.int8)
        scales, sums = device.empty((rows,), np.float32), device.empty((rows,), np.int32)
        return cls(q, scales, sums, rows, k, tiled)

    @property
    def blocks(self) -> int:
        """Blocks of 128 k."""
        return -(-self.k // BLOCK_K)


@dataclass(frozen=True)
class NormRows:
    """Rows of floats that a product takes normed and quantised.

    Attributes:
        rows: float32 [rows, k], any distance apart.
        weight, bias: float32 [k] or None.
    """

    rows: Any
    kind: NormKind = "none"
    weight: Any = None
    bias: Any = None
    eps: float = 0.0

    @property
    def args(self) -> list[Any]:
        """As kernels take them."""
        x = self.rows
        stride = np.int64(x.strides[0] // x.itemsize)
        return [x, self.weight, self.bias, stride, np.int32(x.shape[1]), np.float32(self.eps)]


def norm_quantise(device: Device, x: NormRows, out: Activations) -> None:
    """``out`` = the rows of ``x``, normed and quantised as on the CPU.

    Raises:
        InvalidShapeError: rows too long for the device's shared memory.
    """
    if out.k > _MAX_WIDTH:
        raise InvalidShapeError(f"x: found rows of {out.k}, wanted at most {_MAX_WIDTH}")
    device.launch(
        _MODULE,
        f"norm_quantise<{KINDS.index(x.kind)}, {_flag(out.tiled)}>",
        (out.rows,),
        (_THREADS,),
        [out.q, out.scales, out.sums, *x.args, np.int32(out.blocks * BLOCK_K)],
        16 * -(-out.k // 4),
    )


def arrange(device: Device, x: Any, out: Activations) -> None:
    """``out`` = the int8 rows of ``x`` [rows, k] as they are; its scales are left alone."""
    device.launch(
        _MODULE,
        f"arrange<{_flag(out.tiled)}>",
        (out.rows,),
        (_THREADS,),
        [
            *(out.q, out.sums, x, np.int64(x.strides[0])),
            *(np.int32(out.k), np.int32(out.blocks * BLOCK_K)),
        ],
    )


def _flag(value: bool) -> str:
    return "true" if value else "false"
