"""Devices: where arrays live and kernels run.

A launcher takes a :class:`Device` and knows nothing else of CUDA.  :class:`CudaDevice` is the card
behind CuPy; the tests have another, which runs the same kernels on the CPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import DeviceUnavailableError
from bitnet_ext.gpu import metrics
from bitnet_ext.gpu.compile import Module, machine_code, modules
from bitnet_ext.gpu.dlpack import taken
from bitnet_ext.gpu.scratch import ScratchPool

__all__ = ["CudaDevice", "Device", "cuda_device", "device_of"]

# Bytes for which nobody asks the driver whether they are free, which takes longer than a launch.
_ALWAYS_FREE = 1 << 26

_DLPACK_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_OLDEST = 80  # the first with cp.async and m16n8k32
_OLDEST_CUPY = 14  # before, None as an argument of a kernel was no null pointer
_INSTALL = 'pip install "bitnet-ext[cuda13]" (or cuda12, for drivers older than 580)'


class Device(Protocol):
    """What launchers need of a device.  Arrays are CuPy's on a card."""

    @property
    def number(self) -> int:
        """Of the devices that CUDA shows."""

    @property
    def capability(self) -> int:
        """Compute capability times ten: 80, 86, 89, 90, 100, 120."""

    @property
    def name(self) -> str:
        """Of the card."""

    @property
    def processors(self) -> int:
        """Streaming multiprocessors."""

    @property
    def block_memory(self) -> int:
        """Bytes of shared memory that a block can have."""

    @property
    def stream(self) -> int:
        """Names the current stream."""

    @property
    def scratch(self) -> ScratchPool:
        """Intermediates whose memory calls hand to the next."""

    def warm(self) -> int:
        """Compile every kernel that this device can run, to the disk; how many there are."""

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        """An array on the device, its elements undefined."""

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        """A copy of a host array on the device."""

    def write(self, array: Any, values: npt.NDArray[Any]) -> None:
        """Copy a host array into one of the device's, of its shape and dtype."""

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        """A copy of a device's array on the host; waits for the work before it."""

    def owns(self, array: Any) -> bool:
        """Whether ``array`` is one of this device's."""

    def rows_contiguous(self, array: Any) -> Any:
        """``array`` if the elements of its last axis lie side by side, or a copy."""

    def adopt(self, array: Any) -> Any:
        """An array of another library in this device's memory as one of this device's.

        Raises:
            InvalidShapeError: its library does not export it.
        """

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        """Run ``kernel`` on the current stream.

        Args:
            kernel: one of ``module.kernels``.
            grid, block: blocks, and threads of a block; an empty grid launches nothing.
            args: arrays of the device, NumPy scalars of exactly the parameters' types, or None
                for a null pointer.
            shared: bytes of dynamic shared memory.
        """

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """A call that does the launches of ``work`` again, as one graph.

        ``work`` has been done once before, allocates nothing and copies nothing from or to the
        host; capturing it does not do it.
        """

    def memory(self) -> tuple[int, int, int]:
        """Bytes in use, bytes held for use again as well, and the limit of these; 0: none."""

    def room(self, wanted: int) -> int:
        """Bytes that arrays may still take, at most ``wanted``."""

    def limit_memory(self, limit: int) -> None:
        """Bound the bytes held; 0 lifts the bound. MemoryError for what does not fit."""

    def free_memory(self) -> None:
        """Give back what is held and not in use, ``scratch`` included."""

    def synchronize(self) -> None:
        """Wait for all that was launched."""


class CudaDevice:
    """The current CUDA device, through CuPy."""

    def __init__(self, number: int) -> None:
        """Device ``number`` of those that CUDA shows."""
        self._cupy = _cupy()
        self._device = self._cupy.cuda.Device(number)
        # Asked for once: every launch reads them.
        self.number = number
        self.capability = int(self._device.compute_capability)
        attributes = self._device.attributes
        self.processors = int(attributes["MultiProcessorCount"])
        self.block_memory = int(attributes["MaxSharedMemoryPerBlockOptin"])
        self.scratch = ScratchPool()
        self._kernels: dict[tuple[Module, str], Any] = {}
        self._shared: dict[tuple[Module, str], int] = {}  # bytes allowed

    @property
    def name(self) -> str:
        properties = self._cupy.cuda.runtime.getDeviceProperties(self.number)
        return str(properties["name"].decode())

    @property
    def stream(self) -> int:
        return int(self._cupy.cuda.get_current_stream().ptr)

    def empty(self, shape: Sequence[int], dtype: npt.DTypeLike) -> Any:
        return self._cupy.empty(tuple(shape), dtype)

    def to_device(self, array: npt.NDArray[Any]) -> Any:
        return self._cupy.asarray(array)

    def write(self, array: Any, values: npt.NDArray[Any]) -> None:
        array.set(values)

    def to_host(self, array: Any) -> npt.NDArray[Any]:
        host: npt.NDArray[Any] = self._cupy.asnumpy(array)
        return host

    def owns(self, array: Any) -> bool:
        return isinstance(array, self._cupy.ndarray) and array.device == self._device

    def rows_contiguous(self, array: Any) -> Any:
        side_by_side = array.ndim > 0 and array.strides[-1] == array.itemsize
        return array if side_by_side else self._cupy.ascontiguousarray(array)

    def adopt(self, array: Any) -> Any:
        if isinstance(array, self._cupy.ndarray):
            return array
        return taken(self._cupy.from_dlpack, "array", array)

    def launch(
        self,
        module: Module,
        kernel: str,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        args: Sequence[Any],
        shared: int = 0,
    ) -> None:
        if math.prod(grid) == 0:
            return
        key = module, kernel
        function = self._kernels.get(key) or self._load(module, kernel)
        # 48 KB need no leave, but those are with what the kernel has besides.
        if shared > self._shared.get(key, 0):
            function.max_dynamic_shared_size_bytes = self._shared[key] = shared
        start = time.perf_counter()
        function(grid, block, tuple(args), shared_mem=shared)
        metrics.add(module, self.capability, args, time.perf_counter() - start)

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        stream = self._cupy.cuda.Stream(non_blocking=True)  # the default stream has no capture
        with stream:
            stream.begin_capture()
            try:
                work()
            finally:
                graph = stream.end_capture()

        def replay() -> None:
            start = time.perf_counter()
            graph.launch()  # on the current stream
            metrics.add_graph(self.capability, time.perf_counter() - start)

        return replay

    def memory(self) -> tuple[int, int, int]:
        pool = self._cupy.get_default_memory_pool()
        return int(pool.used_bytes()), int(pool.total_bytes()), int(pool.get_limit())

    def room(self, wanted: int) -> int:
        used, held, limit = self.memory()
        if limit and limit - used < wanted:
            return limit - used
        if wanted <= max(held - used, _ALWAYS_FREE):
            return wanted
        free, _ = self._cupy.cuda.runtime.memGetInfo()
        return min(wanted, int(free) + held - used)

    def limit_memory(self, limit: int) -> None:
        self._cupy.get_default_memory_pool().set_limit(size=limit)

    def free_memory(self) -> None:
        self.scratch.clear()
        self._cupy.get_default_memory_pool().free_all_blocks()

    def synchronize(self) -> None:
        self._cupy.cuda.get_current_stream().synchronize()

    def warm(self) -> int:
        fit = [m for m in modules() if m.arch in (None, f"sm_{self.capability}a")]
        for module in fit:
            self._machine_code(module)
        return sum(len(module.kernels) for module in fit)

    def _load(self, module: Module, kernel: str) -> Any:
        """Every kernel of ``module``, loaded together; gives the one named."""
        path, names = self._machine_code(module)
        raw = self._cupy.RawModule(path=str(path))
        for name in module.kernels:
            self._kernels[module, name] = raw.get_function(names[name])
        return self._kernels[module, kernel]

    def _machine_code(self, module: Module) -> tuple[Path, dict[str, str]]:
        return machine_code(self._cupy.cuda.nvrtc, module, self.capability, _cache_folder())


def cuda_device() -> Device:
    """The current CUDA device.

    Raises:
        DeviceUnavailableError: CuPy, a driver or a fit device is missing; the message says which.
    """
    return _device(_cupy().cuda.runtime.getDevice())


def device_of(array: Any) -> Device | None:
    """The device where ``array`` lives; None for one on the host, or none at all.

    Raises:
        DeviceUnavailableError: it is on a CUDA device that is not the current one, or that CuPy
            cannot use.
    """
    if type(array) is np.ndarray or not hasattr(array, "__dlpack_device__"):
        return None
    try:
        kind, number = array.__dlpack_device__()
    except (BufferError, RuntimeError, TypeError, ValueError):  # nowhere, as torch's "meta"
        return None
    if kind not in _DLPACK_CUDA:
        return None
    device = cuda_device()
    if number != device.number:
        raise DeviceUnavailableError(
            f"device: found an array on CUDA device {number}, wanted the current one, "
            f"{device.number}; change it by `with cupy.cuda.Device({number})`"
        )
    return device


@lru_cache
def _device(number: int) -> CudaDevice:
    device = CudaDevice(number)
    if device.capability < _OLDEST:
        raise DeviceUnavailableError(
            f"device: found compute capability {device.capability / 10}, wanted {_OLDEST / 10} "
            "or newer"
        )
    return device


def _cache_folder() -> Path:
    """CuPy's."""
    return Path(os.environ.get("CUPY_CACHE_DIR") or Path.home() / ".cupy" / "kernel_cache")


def _cupy() -> Any:
    try:
        import cupy
    except ImportError as error:
        raise DeviceUnavailableError(
            f"device: found no CuPy ({error}), wanted {_INSTALL}"
        ) from None
    if int(cupy.__version__.partition(".")[0]) < _OLDEST_CUPY:
        raise DeviceUnavailableError(
            f"device: found CuPy {cupy.__version__}, wanted {_OLDEST_CUPY} or newer: {_INSTALL}"
        )
    if not cupy.is_available():
        try:
            count = cupy.cuda.runtime.getDeviceCount()
        except cupy.cuda.runtime.CUDARuntimeError as error:
            raise DeviceUnavailableError(
                f"device: found {error}, wanted a CUDA driver and a device"
            ) from None
        raise DeviceUnavailableError(f"device: found {count} CUDA devices, wanted one")
    return cupy
