"""Counts of launches, for :class:`bitnet_ext.DispatchMetrics`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from bitnet_ext.gpu.compile import Module

__all__ = ["add", "listen", "snapshot"]

_lock = threading.Lock()
_listeners = 0
_counts: dict[tuple[str, str], tuple[int, int, float]] = {}


def listen(change: int) -> None:
    """One listener more (1) or less (-1); without any, nothing is counted."""
    global _listeners
    with _lock:
        _listeners += change


def add(module: Module, capability: int, args: Sequence[Any], seconds: float) -> None:
    """Count a launch: its module's name, its arrays' bytes, the host's time for it."""
    if not _listeners:
        return
    key = module.file.removesuffix(".cu"), f"sm_{capability}"
    nbytes = sum(array.nbytes for array in args if getattr(array, "ndim", 0))
    with _lock:
        calls, total, before = _counts.get(key, (0, 0, 0.0))
        _counts[key] = calls + 1, total + nbytes, before + seconds


def snapshot() -> dict[tuple[str, str], tuple[int, int, float]]:
    """``{(op, architecture): (calls, bytes, seconds)}`` since the process began."""
    with _lock:
        return dict(_counts)
