"""Counted memory of the engine: current, peak, and a limit."""

from __future__ import annotations

from dataclasses import dataclass

from bitnet_ext import _core
from bitnet_ext.errors import DeviceUnavailableError
from bitnet_ext.gpu import device as devices

__all__ = ["MemoryStats", "memory_stats", "reset_peak_memory", "set_memory_limit"]


@dataclass(frozen=True)
class MemoryStats:
    """Bytes in the engine's own buffers: packed weights, caches, intermediates, outputs.

    Memory-mapped checkpoint files are not counted: the system may drop their pages at any time.
    On a CUDA device everything in CuPy's default pool counts, and ``peak`` is what the pool holds,
    which is no less than was ever in use since :func:`reset_peak_memory`.
    """

    current: int
    peak: int
    limit: int | None


def memory_stats(device: str = "cpu") -> MemoryStats:
    """Bytes in use now, at most since :func:`reset_peak_memory`, and allowed.

    Raises:
        DeviceUnavailableError: ``device`` is not there.
    """
    if _on_gpu(device):
        used, held, limit = devices.cuda_device().memory()
        return MemoryStats(used, held, limit or None)
    stats = _core.memory_stats()
    return MemoryStats(stats["current"], stats["peak"], stats["limit"] or None)


def reset_peak_memory(device: str = "cpu") -> None:
    """Start the peak again from the bytes in use now; on a CUDA device the rest is given back."""
    if _on_gpu(device):
        devices.cuda_device().free_memory()
        return
    _core.reset_peak_memory()


def set_memory_limit(bytes: int | None, device: str = "cpu") -> None:
    """Bound the engine's buffers; None or 0 lifts the bound (``BITNET_MEMORY_LIMIT``).

    Long inputs are then worked on in chunks that fit; MemoryError when nothing fits. On a CUDA
    device it bounds CuPy's default pool, which torch and others do not allocate from.
    """
    on_gpu = _on_gpu(device)
    limit = 0 if bytes is None else bytes
    if not isinstance(limit, int) or limit < 0:
        raise ValueError(f"bytes: found {bytes!r}, wanted None or a non-negative integer")
    if on_gpu:
        devices.cuda_device().limit_memory(limit)
    else:
        _core.set_memory_limit(limit)


def _on_gpu(device: str) -> bool:
    if device not in ("cpu", "cuda"):
        raise DeviceUnavailableError(f"device: found {device!r}, wanted 'cpu' or 'cuda'")
    return device == "cuda"
