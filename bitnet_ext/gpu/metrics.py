"""Counts of launches, for :class:`bitnet_ext.DispatchMetrics`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

from bitnet_ext.gpu.compile import Module

__all__ = ["MODE", "add", "add_copy", "add_graph", "listen", "snapshot"]

MODE: ContextVar[str] = ContextVar("mode", default="op")  # "full", "incremental" or "op"

_lock = threading.Lock()
_listeners = 0
_counts: dict[tuple[str, str, str], tuple[int, int, float]] = {}


def listen(change: int) -> None:
    """One listener more (1) or less (-1); without any, nothing is counted."""
    global _listeners
    with _lock:
        _listeners += change


def add(module: Module, capability: int, args: Sequence[Any], seconds: float) -> None:
    """Count a launch: its module's name, its arrays' bytes, the host's time for it."""
    if _listeners:
        nbytes = sum(array.nbytes for array in args if getattr(array, "ndim", 0))
        _add(module.file.removesuffix(".cu"), capability, nbytes, seconds)


def add_graph(capability: int, seconds: float) -> None:
    """Count a captured graph that ran again: the op "graph", its bytes unknown."""
    if _listeners:
        _add("graph", capability, 0, seconds)


def add_copy(capability: int, nbytes: int, seconds: float) -> None:
    """Count a copy of an op's array between host and device: the op "copy"."""
    if _listeners:
        _add("copy", capability, nbytes, seconds)


def _add(op: str, capability: int, nbytes: int, seconds: float) -> None:
    key = op, f"sm_{capability}", MODE.get()
    with _lock:
        calls, total, before = _counts.get(key, (0, 0, 0.0))
        _counts[key] = calls + 1, total + nbytes, before + seconds


def snapshot() -> dict[tuple[str, str, str], tuple[int, int, float]]:
    """``{(op, architecture, mode): (calls, bytes, seconds)}`` since the process began."""
    with _lock:
        return dict(_counts)
