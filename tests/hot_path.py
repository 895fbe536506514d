"""Guards for the hot path: kernels may run, and nothing else may happen."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cuda_emulator.arrays import EmulatedArray
from cuda_emulator.emulator import EmulatedDevice

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
    """Fails on transfers between host and device, on waits and on allocations, whoever asks: of the
    device, and of its arrays, which are CuPy's on a card."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise TheHost

    with monkeypatch.context() as patch:
        for name in ("empty", "to_device", "to_host", "write", "synchronize"):
            patch.setattr(device, name, refuse)
        if isinstance(device, EmulatedDevice):
            refuse_emulated(patch, refuse)
            yield
        else:
            with refused(pytest.importorskip("cupy"), refuse):
                yield


READS = ("item", "tolist", "__float__", "__int__", "__bool__")


def refuse_emulated(patch: pytest.MonkeyPatch, refuse: Callable[..., Any]) -> None:
    """Every way to the host and to memory that emulated arrays have calls ``refuse`` instead."""

    def made(array: EmulatedArray, _: Any) -> None:
        root: Any = array
        while isinstance(root.base, np.ndarray):
            root = root.base
        if root.flags.owndata:  # NumPy's own memory: no view of the device's
            refuse()

    compute = EmulatedArray.__array_ufunc__

    def computed(array: EmulatedArray, *args: Any, out: Any = (), **options: Any) -> Any:
        return compute(array, *args, out=out, **options) if out else refuse()

    patch.setattr(EmulatedArray, "__array_finalize__", made)
    patch.setattr(EmulatedArray, "__array_ufunc__", computed)
    for name in READS:
        patch.setattr(EmulatedArray, name, refuse)


@contextlib.contextmanager
def refused(cupy: Any, refuse: Callable[..., Any]) -> Iterator[None]:
    """Inside, every transfer, wait and allocation of CuPy's calls ``refuse`` instead.

    Not a memcpy between the card's own arrays, and not ``Device.synchronize``, which is compiled
    and cannot be replaced.
    """
    classes = {
        cupy.ndarray: ("get", "set", *READS),
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
