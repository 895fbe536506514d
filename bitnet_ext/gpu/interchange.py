"""Arrays of other libraries: to NumPy's and back through DLPack, and from a device to the host."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import device_of
from bitnet_ext.gpu.dlpack import given, taken

__all__ = ["host_array", "is_array", "kind_of", "to_host"]

Array = npt.NDArray[Any]
Result = TypeVar("Result")

# Where from_dlpack is of libraries that have none in the top module of their arrays' class.
_HOMES = {"jaxlib": "jax.dlpack"}


def is_array(value: Any) -> bool:
    """Whether ``value`` is an array with axes, of whatever library."""
    return hasattr(value, "__dlpack__") and getattr(value, "ndim", 1) > 0


def host_array(name: str, value: Any) -> Array:
    """``value`` as NumPy's array; of an array of the host the very memory.

    Raises:
        InvalidShapeError: it is on a CUDA device, or its library does not export it, as torch does
            not what requires a gradient.
    """
    if type(value) is np.ndarray:
        return value
    if device_of(value) is not None:
        raise InvalidShapeError(f"{name}: found it on a CUDA device, wanted it on the host")
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return np.asarray(value)
    found: Array = taken(np.from_dlpack, name, value)
    return found


def to_host(name: str, value: Any) -> Array:
    """As :func:`host_array`, of an array on the current CUDA device a copy, which waits for the
    work before it: for what the host must know, as token ids and lengths.

    Raises:
        InvalidShapeError: as :func:`host_array`.
        DeviceUnavailableError: it is on another device, or one that CuPy cannot use.
    """
    device = device_of(value)
    return host_array(name, value) if device is None else device.to_host(device.adopt(value))


def kind_of(name: str, value: Any) -> Callable[[Result], Result]:
    """What makes an array of NumPy's or CuPy's one of ``value``'s library: asked for before the
    work, whose result would be lost without it.

    Raises:
        InvalidShapeError: that has no ``from_dlpack``.
    """
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack__"):
        return _unchanged
    for base in type(value).__mro__:
        top = base.__module__.partition(".")[0]
        if top == "cupy":
            return _unchanged
        home: Any = importlib.import_module(_HOMES[top]) if top in _HOMES else sys.modules.get(top)
        if hasattr(home, "from_dlpack"):
            return partial(given, home.from_dlpack)
    raise InvalidShapeError(
        f"{name}: found {type(value).__name__}, whose library has no from_dlpack to make the "
        "result its own, wanted one that has, or a NumPy array"
    )


def _unchanged(array: Result) -> Result:
    return array
