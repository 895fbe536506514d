"""A CUDA device on the CPU for tests: the very sources that ship, compiled by g++."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import math
import mmap
import os
import platform
import shutil
import subprocess
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from cuda_emulator.arrays import EmulatedArray

from bitnet_ext.gpu import metrics
from bitnet_ext.gpu.compile import Module, modules
from bitnet_ext.gpu.scratch import ScratchPool

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build" / "cuda_emulator"
FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-shared"]
FLAGS += ["-U_FORTIFY_SOURCE", "-w"]
# Bytes of shared memory that a block can have, by capability.
BLOCK_MEMORY = {
    capability: kib << 10
    for capability, kib in {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}.items()
}
ALIGNMENT = 16  # of arrays' first bytes; they end where their last bytes do, or up to 15 later


def missing() -> str | None:
    """Why kernels cannot run here; None where they can."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return "the emulator switches stacks as Linux on x86-64 does"
    return None if _compiler() else "needs g++"


class EmulatedDevice:
    """Runs kernels, block by block, on NumPy arrays.

    Args:
        capability: of the device, times ten; what ``__CUDA_ARCH__`` says.
        processors: streaming multiprocessors, for launchers that ask.
        descending: run blocks and threads from the last to the first.
    """

    def __init__(
        self, capability: int = 80, processors: int = 4, *, descending: bool = False
    ) -> None:
        self.number = 0
        self.name = "emulated"
        self.capability = capability
        self.processors = processors
        self.block_memory = BLOCK_MEMORY[capability]
        self.descending = descending
        self.stream = 0
        self.scratch = ScratchPool()
        self._memory = _Memory()
        self.launches: list[tuple[str, tuple[int, ...], tuple[int, ...], int]] = []

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> EmulatedArray:
        """An array of poison: 0xa5 in every byte."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        self._count(size)
        array = _guarded(size)
        self._watch(array, size)
        return array.view(dtype).reshape(shape)

    def to_device(self, array: npt.ArrayLike) -> EmulatedArray:
        host = np.asarray(array)
        copy = self.empty(host.shape, host.dtype)
        copy[...] = host
        return copy

    def write(self, array: EmulatedArray, values: npt.NDArray[Any]) -> None:
        assert isinstance(array, EmulatedArray)
        assert (array.shape, array.dtype) == (values.shape, values.dtype)
        array[...] = values

    def to_host(self, array: EmulatedArray) -> npt.NDArray[Any]:
        return np.array(array, subok=False)

    def owns(self, array: Any) -> bool:
        return isinstance(array, EmulatedArray)

    def rows_contiguous(self, array: EmulatedArray) -> EmulatedArray:
        side_by_side = array.ndim > 0 and array.strides[-1] == array.itemsize
        return array if side_by_side else self.to_device(array)

    def adopt(self, array: EmulatedArray) -> EmulatedArray:
        return array

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """As on a card, with every argument checked against the kernel's parameters."""
        self._check_geometry(kernel, grid, block, shared)
        self.launches.append((kernel, tuple(grid), tuple(block), shared))
        if math.prod(grid) == 0:
            return
        library = _load(module, self.capability)
        index, parameters = library.kernels[kernel]
        assert len(args) == len(parameters), f"{kernel}: {len(args)} args, wanted {parameters}"
        values = [
            _value(kernel, i, *pair) for i, pair in enumerate(zip(args, parameters, strict=True))
        ]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        sizes = [(ctypes.c_uint32 * 3)(*(*n, 1, 1)[:3]) for n in (grid, block)]
        start = time.perf_counter()
        error = library.launch(
            index, *sizes, ctypes.c_size_t(shared), ctypes.c_bool(self.descending), pointers
        )
        assert not error, error.decode()
        metrics.add(module, self.capability, args, time.perf_counter() - start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """``work`` itself: nothing is captured here."""
        return work

    def memory(self) -> tuple[int, int, int]:
        gc.collect()
        return self._memory.used, max(self._memory.used, self._memory.held), self._memory.limit

    def room(self, wanted: int) -> int:
        used, _, limit = self.memory()
        return min(wanted, limit - used) if limit else wanted

    def limit_memory(self, limit: int) -> None:
        self._memory.limit = limit

    def free_memory(self) -> None:
        self.scratch.clear()
        gc.collect()
        self._memory.held = self._memory.used

    def synchronize(self) -> None:
        """Nothing: launches have ended when they return."""

    def warm(self) -> int:
        return sum(len(module.kernels) for module in modules())

    def _count(self, size: int) -> None:
        memory = self._memory
        if memory.limit and memory.used + size > memory.limit:
            raise MemoryError(f"{size} bytes: {memory.used} are in use, at most {memory.limit}")
        memory.add(size)

    def _watch(self, array: EmulatedArray, size: int) -> None:
        """Count ``array`` until it is gone; its views keep it alive."""
        weakref.finalize(array, self._memory.add, -size)

    def _check_geometry(
        self, kernel: str, grid: tuple[int, ...], block: tuple[int, ...], shared: int
    ) -> None:
        limit = self.block_memory
        assert shared <= limit, f"{kernel}: {shared} bytes of shared memory, at most {limit}"
        assert 0 < math.prod(block) <= 1024, f"{kernel}: block {block}"
        wide, *others = grid
        assert wide < 2**31, f"{kernel}: grid {grid}"
        assert all(n < 2**16 for n in others), f"{kernel}: grid {grid}"


@dataclass
class _Memory:
    """Bytes of the arrays that are alive, the most of them at one time, and how many may be."""

    used: int = 0
    held: int = 0
    limit: int = 0

    def add(self, size: int) -> None:
        self.used += size
        self.held = max(self.held, self.used)


class _Library:
    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._library.emulated_kernel.restype = ctypes.c_char_p
        self.launch = self._library.emulated_launch
        self.launch.restype = ctypes.c_char_p
        self.kernels: dict[str, tuple[int, list[str]]] = {}
        while text := self._library.emulated_kernel(len(self.kernels)):
            name, *parameters = text.decode().split("\t")
            self.kernels[name] = len(self.kernels), parameters


@functools.lru_cache
def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


@functools.lru_cache
def _load(module: Module, capability: int) -> _Library:
    """Compile ``module`` for the host, once by content."""
    own = {path.name: path.read_text() for path in HERE.glob("*.*h")}
    rows = "".join(f'    emulated::kernel_of("{k}", &{k}),\n' for k in module.kernels)
    text = module.source(own)
    text += f"const std::vector<emulated::Kernel> emulated::kernels = {{\n{rows}}};\n"
    compiler = _compiler()
    assert compiler
    command = [compiler, *FLAGS, f"-DEMULATED_ARCH={capability * 10}", "-x", "c++"]
    key = hashlib.sha256("\0".join([*command, text]).encode()).hexdigest()[:20]
    path = BUILD / f"{Path(module.file).stem}.{capability}.{key}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(f".{os.getpid()}")
        done = subprocess.run(
            [*command, "-", "-o", draft], input=text, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:5000]
        draft.replace(path)
    return _Library(path)


def _guarded(nbytes: int) -> EmulatedArray:
    """Bytes at the end of a page, before one that may not be touched."""
    page = mmap.PAGESIZE
    size = -(-max(nbytes, 1) // page) * page
    memory = mmap.mmap(-1, size + page)
    base = np.frombuffer(memory, np.uint8)
    base[:] = 0xA5
    libc = ctypes.CDLL(None, use_errno=True)
    status = libc.mprotect(ctypes.c_void_p(base.ctypes.data + size), ctypes.c_size_t(page), 0)
    assert status == 0
    start = size - -(-nbytes // ALIGNMENT) * ALIGNMENT
    return base[start : start + nbytes].view(EmulatedArray)


def _value(kernel: str, position: int, argument: Any, parameter: str) -> Any:
    """One argument as the kernel takes it."""
    kind, size = parameter[0], int(parameter[1:])
    where = f"{kernel}: argument {position}"
    if kind == "p":
        if argument is None:
            return ctypes.c_void_p(None)
        assert isinstance(argument, EmulatedArray), f"{where}: {type(argument)}, wanted an array"
        fits = size in (0, argument.itemsize)
        assert fits, f"{where}: {argument.dtype}, wanted elements of {size} bytes"
        return ctypes.c_void_p(argument.ctypes.data)
    assert isinstance(argument, np.generic), f"{where}: {argument!r}, wanted a NumPy scalar"
    assert argument.dtype.itemsize == size, f"{where}: {argument.dtype}, wanted {size} bytes"
    assert (argument.dtype.kind == "f") == (kind == "f"), f"{where}: {argument.dtype}"
    return (ctypes.c_char * size).from_buffer_copy(argument.tobytes())
