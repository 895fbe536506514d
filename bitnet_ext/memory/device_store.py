"""Keys and values on a CUDA device, with the interface by which a KVCache holds the CPU's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.kv_cache import DeviceCache

__all__ = ["DeviceStore"]

Int32 = npt.NDArray[np.int32]


class DeviceStore:
    """A DeviceCache that one call uses at a time.

    Attributes:
        cache: the arrays.
        steps: what calls keep beside them, as captured graphs; empty after they were replaced.
    """

    def __init__(self, device: Device, *shape: Any) -> None:
        self.cache = DeviceCache(device, *shape)
        self.steps: dict[Any, Any] = {}
        self._lock = threading.RLock()

    @property
    def lengths(self) -> Int32:
        """Tokens held by each sequence, int32 [B]."""
        return self.cache.length

    @property
    def nbytes_reserved(self) -> int:
        """Bytes on the device."""
        return self.cache.nbytes

    @contextmanager
    def lease(self) -> Iterator[None]:
        """Exclude other calls.

        Raises:
            RuntimeError: another call has the cache.
        """
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "cache: in use by another call; give each concurrent call a cache of its own"
            )
        try:
            yield
        finally:
            self._lock.release()

    def reserve(self, lengths: Int32) -> None:
        """Nothing: everything is reserved from the start."""

    def advance(self, counts: Int32) -> None:
        """The device has appended ``counts`` tokens."""
        self.cache.note(counts)

    def truncate(self, lengths: Int32) -> None:
        """Keep the first tokens of each sequence."""
        with self.lease():
            self.cache.truncate(lengths)

    def select(self, rows: Int32) -> None:
        """Sequence i becomes the old ``rows[i]``."""
        with self.lease():
            self.cache.select(rows)
            self.steps.clear()

    def copy(self) -> DeviceStore:
        """An independent store with the same tokens."""
        twin = object.__new__(DeviceStore)
        with self.lease():
            twin.cache = self.cache.copy()
        twin.steps = {}
        twin._lock = threading.RLock()
        return twin
