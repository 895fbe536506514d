"""CuPy's own ways to the host and to memory, for a guard of the hot path on a card.

The package asks for the host through its ``Device``; what goes past that, as ``float(array)`` or a
wait for an event does, comes by here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest


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
