"""Guards for the hot path: kernels may run, and nothing else may happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

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
    """Fails on transfers between host and device, on waits and on allocations, whoever asks: all of
    them go through the device's methods, and on a card through CuPy's."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise TheHost

    with monkeypatch.context() as patch:
        for name in ("empty", "to_device", "to_host", "write", "synchronize"):
            patch.setattr(device, name, refuse)
        with contextlib.ExitStack() as stack:
            if type(device).__name__ == "CudaDevice":
                cupy = pytest.importorskip("cupy")
                stack.enter_context(refused(cupy, refuse))
            yield


@contextlib.contextmanager
def refused(cupy: Any, refuse: Callable[..., Any]) -> Iterator[None]:
    """Inside, every transfer, wait and allocation of CuPy's calls ``refuse`` instead.

    Not a memcpy between the card's own arrays, and not ``Device.synchronize``, which is compiled
    and cannot be replaced.
    """
    classes = {
        cupy.ndarray: ("get", "set", "item", "tolist", "__float__", "__int__", "__bool__"),
        cupy.cuda.Stream: ("synchronize",),
        cupy.cuda.ExternalStream: ("synchronize",),
        cupy.cuda.Event: ("synchronize",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for owner, names in classes.items():
            for name in names:
                patch.setattr(owner, name, refuse)
        with cupy.cuda.using_allocator(refuse):
            yield
