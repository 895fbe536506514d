"""Checks of arguments that several public functions take."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError

__all__ = ["FAR", "lengths_to_keep", "sequences_to_select", "whole_number", "window_extents"]

FAR = 1 << 40  # sizes and positions stay below it, so that no sum of a few overflows


def whole_number(name: str, value: Any, below: int | None = None) -> int:
    """``value`` as an integer of 0 or more (and less than ``below``).

    Raises:
        InvalidShapeError: it is none.
    """
    if type(value) is int and value >= 0 and (below is None or value < below):
        return value  # at once: small masks take less time than the checks
    if not _is_integer(value) or value < 0 or (below is not None and value >= below):
        limit = "or more" if below is None else f"to {below - 1}"
        raise InvalidShapeError(f"{name}: found {value!r}, wanted an integer of 0 {limit}")
    return int(value)


def window_extents(window: Any) -> tuple[int, int]:
    """``window`` as (left, right), at most FAR; None is (-1, -1), unbounded.

    Raises:
        InvalidShapeError: it is no pair of integers of -1 or more.
    """
    if window is None:
        return -1, -1
    try:
        left, right = window
    except (TypeError, ValueError):
        raise InvalidShapeError(f"window: found {window!r}, wanted (left, right)") from None
    if not all(_is_integer(side) and side >= -1 for side in (left, right)):
        raise InvalidShapeError(
            f"window: found {window!r}, wanted two integers of -1 (unbounded) or more"
        )
    return min(int(left), FAR), min(int(right), FAR)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def lengths_to_keep(n: Any, batch_size: int) -> npt.NDArray[np.integer[Any]]:
    """Tokens that a cache keeps of each sequence: one number, or one per sequence.

    Raises:
        InvalidShapeError: a negative number, or the wrong count of numbers.
    """
    keep = np.asarray(n)
    if keep.dtype.kind not in "iu" or keep.shape not in ((), (batch_size,)):
        raise InvalidShapeError(f"n: found {n!r}, wanted an integer or {batch_size} integers")
    if keep.size and keep.min() < 0:
        raise InvalidShapeError(f"n: found {int(keep.min())}, wanted 0 or more")
    return keep


def sequences_to_select(rows: Any, batch_size: int) -> npt.NDArray[np.integer[Any]]:
    """Sequences of a cache, in the order in which they are to stand.

    Raises:
        InvalidShapeError: no list of integers, or an index outside the batch.
    """
    index = np.asarray(rows)
    if index.ndim != 1 or (index.size and index.dtype.kind not in "iu"):
        raise InvalidShapeError(f"rows: found {rows!r}, wanted a list of integers")
    if index.size and (index.min() < 0 or index.max() >= batch_size):
        raise InvalidShapeError(
            f"rows: found {index.tolist()}, wanted values from 0 to {batch_size - 1}"
        )
    return index
