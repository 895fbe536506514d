"""Exchange of arrays by DLPack, bfloat16 included, for which NumPy and CuPy have no name there."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError

__all__ = ["given", "taken"]

# DLDataTypeCode
_UINT, _BFLOAT = 1, 4

# Bytes before the code in a capsule: of the DLTensor (data, device, ndim), which a versioned one
# has behind version, context, deleter and flags.
_CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}
_is_valid = ctypes.pythonapi["PyCapsule_IsValid"]
_is_valid.argtypes = [ctypes.py_object, ctypes.c_char_p]
_pointer = ctypes.pythonapi["PyCapsule_GetPointer"]
_pointer.argtypes, _pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p


def taken(from_dlpack: Callable[[Any], Any], name: str, array: Any) -> Any:
    """``array`` of another library, by NumPy's or CuPy's ``from_dlpack``.

    Raises:
        InvalidShapeError: its library does not export it, as torch does not what requires a
            gradient.
    """
    export = _Export(array, _BFLOAT, _UINT)
    try:
        found = from_dlpack(export)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise InvalidShapeError(
            f"{name}: found {type(array).__name__} ({error}), wanted an array that DLPack exports"
        ) from None
    return found.view(_bfloat16(name)) if export.renamed else found


def given(from_dlpack: Callable[[Any], Any], array: Any) -> Any:
    """NumPy's or CuPy's ``array`` as one of another library, by its ``from_dlpack``."""
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
