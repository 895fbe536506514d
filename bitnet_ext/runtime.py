"""ISA, threads, dispatch and metrics of the process."""

from __future__ import annotations

import platform
import sys
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from bitnet_ext import _core
from bitnet_ext.gpu import metrics

__all__ = [
    "DispatchMetrics",
    "OpCount",
    "available_isas",
    "dispatch_info",
    "get_isa",
    "get_num_threads",
    "set_isa",
    "set_num_threads",
    "show_config",
]


def available_isas() -> list[str]:
    """Names of the instruction sets this CPU can run, slowest first."""
    return _core.available_isas()


def get_isa() -> str:
    """Name of the instruction set in force (``BITNET_ISA`` or the best available)."""
    return _core.get_isa()


def set_isa(name: str) -> None:
    """Force the instruction set, or "auto" for the best available.

    Raises:
        RuntimeError: the name is unknown or this CPU cannot run it; nothing changes.
    """
    _core.set_isa(name)


def get_num_threads() -> int:
    """Threads a kernel may use, the caller's included."""
    return _core.num_threads()


def set_num_threads(n: int) -> None:
    """Set the threads a kernel may use; results never depend on it.

    Raises:
        ValueError: ``n`` is not a positive integer.
    """
    if not isinstance(n, int) or isinstance(n, bool) or not 1 <= n <= 4096:
        raise ValueError(f"num_threads: found {n!r}, wanted an integer from 1 to 4096")
    _core.set_num_threads(n)


def dispatch_info() -> dict[str, dict[str, Any]]:
    """For each kernel family: the table in force and the ISAs that could be chosen."""
    return {
        concept: {"current": isa, "available": available_isas()}
        for concept, isa in _core.kernel_tables().items()
    }


def show_config() -> None:
    """Print versions, CPU, ISA and threads: what a bug report needs."""
    import numpy as np

    rows = {
        "bitnet_ext": _core.__version__,
        "python": sys.version.split()[0],
        "numpy": np.__version__,
        "platform": platform.platform(),
        "cpu": _core.cpu_brand(),
        "isa": f"{get_isa()} ({_core.isa_description(get_isa())})",
        "available": ", ".join(available_isas()),
        "threads": str(get_num_threads()),
    }
    for name, value in rows.items():
        print(f"{name:12} {value}")


@dataclass(frozen=True)
class OpCount:
    """Calls, bytes moved, seconds and the most threads of one op.

    On a device: the bytes of the arrays given, the host's seconds to launch, no threads.
    """

    calls: int
    bytes: int
    seconds: float
    threads: int


class DispatchMetrics:
    """Counts, per op, device, ISA and mode, what the kernels did inside a ``with`` block."""

    def __enter__(self) -> Self:
        self._before = _snapshot()
        _core.metrics_listen(1)
        metrics.listen(1)
        self._after: dict[tuple[str, str, str, str], OpCount] | None = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        _core.metrics_listen(-1)
        metrics.listen(-1)
        self._after = _snapshot()

    def as_dict(self) -> dict[tuple[str, str, str, str], OpCount]:
        """``{(op, device, isa, mode): OpCount}``; mode is "full", "incremental" or "op".

        On the device "cuda", op is the kernel's family, "graph" for a captured step, or "copy"
        for arrays of the host that an op takes there and back, and isa the architecture, as
        "sm_90". Seconds are the host's: launches do not wait.
        """
        after = self._after if self._after is not None else _snapshot()
        result = {}
        for key, now in after.items():
            then = self._before.get(key, OpCount(0, 0, 0.0, 0))
            if now.calls > then.calls:
                result[key] = OpCount(
                    now.calls - then.calls,
                    now.bytes - then.bytes,
                    now.seconds - then.seconds,
                    now.threads,
                )
        return result


def _snapshot() -> dict[tuple[str, str, str, str], OpCount]:
    host = {
        (op, "cpu", isa, mode): OpCount(calls, nbytes, nanoseconds * 1e-9, threads)
        for op, isa, mode, calls, nbytes, nanoseconds, threads in _core.metrics_snapshot()
    }
    device = {
        (op, "cuda", arch, mode): OpCount(calls, nbytes, seconds, 0)
        for (op, arch, mode), (calls, nbytes, seconds) in metrics.snapshot().items()
    }
    return host | device
