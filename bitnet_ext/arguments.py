"""Checks of arguments that several public functions take."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError

__all__ = ["whole_number", "window_extents"]


def whole_number(name: str, value: Any, below: int | None = None) -> int:
    """``value`` as an integer of 0 or more (and less than ``below``).

    Raises:
        InvalidShapeError: it is none.
    """
    if type(value) is int and value >= 0 and below is None:
        return value  # at once: small masks take less time than the checks
    if not _is_integer(value) or value < 0 or (below is not None and value >= below):
        limit = "or more" if below is None else f"to {below - 1}"
        raise InvalidShapeError(f"{name}: found {value!r}, wanted an integer of 0 {limit}")
    return int(value)


def window_extents(window: Any) -> tuple[int, int]:
    """``window`` as (left, right); None is (-1, -1), unbounded.

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
    return int(left), int(right)


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
