"""Arrays of other libraries: to NumPy's and back through DLPack, and from a device to the host."""

from __future__ import annotations

import ctypes
import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import device_of

__all__ = ["host_array", "is_array", "kind_of", "to_host"]

Array = npt.NDArray[Any]
Result = TypeVar("Result")

# Where from_dlpack is of libraries that have none in the top module of their arrays' class.
_HOMES = {"jaxlib": "jax.dlpack"}

# DLDataTypeCode
_UINT, _BFLOAT = 1, 4

# Bytes before the code in a capsule: of the DLTensor (data, device, ndim), which a versioned one
# has behind version, context, deleter and flags.
_CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}
_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


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
    export = _Export(value, _BFLOAT, _UINT)
    try:
        array = np.from_dlpack(export)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidShapeError(
            f"{name}: found {type(value).__name__} ({error}), wanted an array that DLPack exports"
        ) from None
    return array.view(_bfloat16(name)) if export.renamed else array


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
            return partial(_converted, home.from_dlpack)
    raise InvalidShapeError(
        f"{name}: found {type(value).__name__}, whose library has no from_dlpack to make the "
        "result its own, wanted one that has, or a NumPy array"
    )


def _unchanged(array: Result) -> Result:
    return array


def _converted(from_dlpack: Callable[[Any], Any], array: Any) -> Any:
    if array.dtype.name == "bfloat16":
        array = _Export(array.view(np.uint16), _UINT, _BFLOAT)
    return from_dlpack(array)


class _Export:
    """``array`` as it exports itself, but with the type code ``wanted`` for ``found``: NumPy has
    no bfloat16 to exchange."""

    renamed = False

    def __init__(self, array: Any, found: int, wanted: int) -> None:
        self._array, self._found, self._wanted = array, found, wanted

    def __dlpack__(self, **options: Any) -> Any:
        capsule = self._array.__dlpack__(**options)
        name = next(name for name in _CODE_AT if _is_valid(capsule, name))
        code = ctypes.c_uint8.from_address(_pointer(capsule, name) + _CODE_AT[name])
        if code.value == self._found:
            code.value, self.renamed = self._wanted, True
        return capsule

    def __dlpack_device__(self) -> Any:
        return self._array.__dlpack_device__()


def _bfloat16(name: str) -> np.dtype[Any]:
    try:
        from ml_dtypes import bfloat16
    except ImportError:
        raise InvalidShapeError(
            f"{name}: found bfloat16, wanted the package ml_dtypes, which has it for NumPy"
        ) from None
    found: np.dtype[Any] = np.dtype(bfloat16)
    return found
