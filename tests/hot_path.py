"""Guards for the hot path: kernels may run, and nothing else may happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from hot_card import refused

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


class TheHost(AssertionError):
    """The hot path asked for the host, or for memory."""


@contextlib.contextmanager
def hot(device: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails on transfers between host and device and on allocations, whoever asks: the package does
    so through the device's methods, and what goes past them on a card through CuPy's."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise TheHost

    with monkeypatch.context() as patch:
        for name in ("empty", "to_device", "to_host", "write"):
            patch.setattr(device, name, refuse)
        with contextlib.ExitStack() as stack:
            if type(device).__name__ == "CudaDevice":
                stack.enter_context(refused(pytest.importorskip("cupy"), refuse))
            yield
