"""Counted memory of the engine: current, peak, and a limit."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_ext import _core
from bitnet_ext.errors import DeviceUnavailableError

__all__ = ["MemoryStats", "memory_stats", "reset_peak_memory", "set_memory_limit"]


@dataclass(frozen=True)
class MemoryStats:
    """Bytes in the engine's own buffers: packed weights, caches, intermediates, outputs.

    Memory-mapped checkpoint files are not counted: the system may drop their pages at any time.
    """

    current: int
    peak: int
    limit: int | None


def memory_stats(device: str = "cpu") -> MemoryStats:
    """Bytes in use now, at most since :func:`reset_peak_memory`, and allowed."""
    _check_device(device)
    stats = _core.memory_stats()
    return MemoryStats(stats["current"], stats["peak"], stats["limit"] or None)


def reset_peak_memory() -> None:
    """Start the peak again from the bytes in use now."""
    _core.reset_peak_memory()


def set_memory_limit(bytes: int | None, device: str = "cpu") -> None:
    """Bound the engine's buffers; None or 0 lifts the bound (``BITNET_MEMORY_LIMIT``).

    Long inputs are then worked on in chunks that fit; MemoryError when nothing fits.
    """
    _check_device(device)
    limit = 0 if bytes is None else bytes
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"bytes: found {bytes!r}, wanted None or a non-negative integer")
    _core.set_memory_limit(limit)


def _check_device(device: str) -> None:
    if device != "cpu":
        raise DeviceUnavailableError(f"device: found {device!r}, wanted 'cpu'")
