"""What CuPy refuses of its arrays, refused of the emulated device's, which are NumPy's as well."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import BuiltinFunctionType
from typing import Any

import numpy as np
import pytest

from bitnet_ext import _core

CONVERSIONS = ("array", "asarray", "asanyarray", "ascontiguousarray", "require", "frombuffer")


class EmulatedArray(np.ndarray[Any, Any]):
    """An array in the emulated device's memory; a page that may not be touched follows it.

    Tests may mix it with arrays of the host, the package may not.
    """

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0  # kDLCUDA

    def __array_ufunc__(
        self, ufunc: Any, method: str, *inputs: Any, out: Any = (), **kwargs: Any
    ) -> Any:
        if from_package() and any(map(on_host, (*inputs, *out))):
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        if out:
            kwargs["out"] = tuple(map(plain, out))
        found = getattr(ufunc, method)(*map(plain, inputs), **kwargs)
        return out[0] if out else there(found)

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if from_package() and np.ndarray in types:
            raise TypeError("Unsupported type <class 'numpy.ndarray'>")
        return there(super().__array_function__(func, types, args, kwargs))

    def __setitem__(self, key: Any, value: Any) -> None:
        if from_package() and on_host(value):
            raise ValueError("non-scalar numpy.ndarray cannot be used for fill")
        super().__setitem__(key, value)


def plain(value: Any) -> Any:
    return value.view(np.ndarray) if isinstance(value, EmulatedArray) else value


def there(found: Any) -> Any:
    """What NumPy found, as an array of the device's."""
    return found.view(EmulatedArray) if type(found) is np.ndarray else found


def on_host(value: Any) -> bool:
    return isinstance(value, np.ndarray) and not isinstance(value, EmulatedArray) and value.ndim > 0


def from_package() -> bool:
    """Whether the package itself called the caller."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return str(name).startswith("bitnet_ext")


def refuse_conversions(patch: pytest.MonkeyPatch) -> None:
    """Let NumPy and the CPU's kernels raise a TypeError for arrays of the device, as of CuPy's."""
    for name in CONVERSIONS:
        patch.setattr(np, name, refusing(getattr(np, name)))
    for name, kernel in vars(_core).items():
        if isinstance(kernel, BuiltinFunctionType):
            patch.setattr(_core, name, refusing(kernel))


def refusing(call: Callable[..., Any]) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        if from_package() and any(map(on_device, (*args, *kwargs.values()))):
            raise TypeError(
                "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to "
                "construct a NumPy array explicitly."
            )
        return call(*args, **kwargs)

    return called


def on_device(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(part, EmulatedArray) for part in value)
    return isinstance(value, EmulatedArray)
