"""Checks and conversions of stored numbers, shared by the readers."""

from __future__ import annotations

import math
from typing import cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.source import Array, FloatName
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "as_float32",
    "bf16_bits",
    "codes_from_floats",
    "positive_scale",
    "require_finite",
    "ternary_levels",
]

CHUNK = 1 << 22  # elements looked at in one step, so that temporaries stay small


def as_float32(array: Array, dtype: FloatName) -> npt.NDArray[np.float32]:
    """Stored floats (f16 as such or as bits, bf16 as bits) as float32; exact."""
    if dtype == "bf16":
        return (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if dtype == "f16":
        return array.view(np.float16).astype(np.float32)
    return array.view(np.float32)


def bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """float32 rounded to bfloat16 bits: to nearest, ties to even; finite values only."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> 16).astype(
        np.uint16
    )


def positive_scale(value: float, where: str) -> float:
    """A weight scale as float.

    Raises:
        CheckpointError: NaN, infinite, negative or zero.
    """
    if not (0 < value < math.inf):
        raise CheckpointError(f"{where}: found the scale {value}, wanted a positive finite number")
    return float(np.float32(value))


def require_finite(values: npt.NDArray[np.float32], where: str) -> None:
    """Raise CheckpointError where a value is NaN or infinite."""
    if not np.isfinite(values).all():
        index = int(np.argmin(np.isfinite(values)))
        raise CheckpointError(
            f"{where}: found {values.reshape(-1)[index]} at {index}, wanted finite numbers"
        )


def codes_from_floats(values: Array, where: str) -> npt.NDArray[np.int8]:
    """int8 codes of a matrix that already holds -1, 0 and 1.

    Raises:
        UnsupportedModelError: another value: the matrix is not ternary.
    """
    codes = np.empty(values.shape, np.int8)
    flat, out = values.reshape(-1), codes.reshape(-1)
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK]
        with np.errstate(invalid="ignore"):
            out[start : start + CHUNK] = part
        wrong = (out[start : start + CHUNK] != part) | (np.abs(part) > 1)
        if wrong.any():
            bad = part[int(np.argmax(wrong))]
            raise UnsupportedModelError(f"{where}: found the value {bad}, wanted -1, 0 or 1")
    return codes


def ternary_levels(values: Array, dtype: FloatName) -> tuple[npt.NDArray[np.int8], float] | None:
    """Codes and scale of a float matrix that holds only -s, 0 and s; None for any other.

    An all-zero matrix has scale 1.
    """
    flat = values.reshape(-1)
    level = np.float32(0)
    for start in range(0, flat.size, CHUNK):
        part = np.abs(as_float32(flat[start : start + CHUNK], dtype))
        highest = part.max(initial=np.float32(0))
        level = level or highest
        if not np.all((part == 0) | (part == level)):  # NaN fails too
            return None
    codes = np.empty(flat.shape, np.int8)
    for start in range(0, flat.size, CHUNK):
        part = as_float32(flat[start : start + CHUNK], dtype)
        codes[start : start + CHUNK] = np.sign(part)
    shape = cast(tuple[int, ...], values.shape)
    return codes.reshape(shape), float(level) or 1.0
