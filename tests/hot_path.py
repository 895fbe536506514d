"""A guard for the hot path: a device on which kernels run, and nothing else may happen."""

from __future__ import annotations

from typing import Any

FORBIDDEN = ("empty", "to_device", "to_host", "adopt")


class HotPath:
    """``device``, but allocations, transfers and copies fail the test that makes them."""

    def __init__(self, device: Any) -> None:
        self._device = device

    def __getattr__(self, name: str) -> Any:
        assert name not in FORBIDDEN, f"{name} in the hot path"
        return getattr(self._device, name)

    def rows_contiguous(self, array: Any) -> Any:
        found = self._device.rows_contiguous(array)
        assert found is array, "a copy in the hot path"
        return found
