"""Intermediates of calls on a device, whose memory the next call may have."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Scratch", "ScratchPool"]


class Scratch:
    """Named arrays; those of a name share their memory, the latest has it."""

    def __init__(self) -> None:
        self._held: dict[str, Any] = {}

    def take(
        self,
        empty: Callable[[tuple[int, ...], npt.DTypeLike], Any],
        name: str,
        shape: tuple[int, ...],
        dtype: npt.DTypeLike,
    ) -> Any:
        """An array, its elements undefined; made by ``empty`` where the memory held is too small.

        Raises:
            MemoryError: the device refuses.
        """
        size = math.prod(shape) * np.dtype(dtype).itemsize
        held = self._held.get(name)
        if held is None or held.size < size:
            held = self._held[name] = None  # given back before more is taken
            held = self._held[name] = empty((size,), np.uint8)
        return held[:size].view(dtype).reshape(shape)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(held.size for held in self._held.values() if held is not None)


class ScratchPool:
    """Leases scratch: each concurrent call has its own, a lone caller always the same.

    What a call leaves to the device may still be under way when the call returns, so calls on
    different streams share nothing.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[Scratch]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def lease(self, stream: int) -> Iterator[Scratch]:
        """Scratch that is exclusively the caller's."""
        with self._lock:
            free = self._free.get(stream)
            scratch = free.pop() if free else Scratch()
        try:
            yield scratch
        finally:
            with self._lock:
                self._free.setdefault(stream, []).append(scratch)

    def clear(self) -> None:
        """Give back what nobody leases now."""
        with self._lock:
            self._free.clear()
