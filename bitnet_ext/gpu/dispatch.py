"""Where an op on arrays of the host runs: on the CPU, or by way of a CUDA device.

Both have the same bits, so only time decides, estimated from one table::

    CPU      work / (host * threads)
    device   call_seconds + bytes copied / link_bytes_per_second + work / device

with the multiply-adds a second of a CPU's thread and of the device for each op.  The device must
win by the factor ``margin``.  A mask stays where it is made: one of more than ``mask_elements`` on
a device.  Norms, rotations and their gradients have no ``device``: memory bounds them on both sides
and a link has less of it, so a copy never pays and they run where their arrays live.

``dispatch.json`` is that table.  As shipped it is a cautious guess ("measured": null): a fast CPU,
a slow link and device.  ``bench/gpu/bench_dispatch.py`` measures a machine's and writes it there.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import bitnet_ext.gpu
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.gpu import device as devices
from bitnet_ext.gpu import metrics
from bitnet_ext.gpu.device import Device

__all__ = [
    "LEAST_WORK",
    "TABLE",
    "Rates",
    "Table",
    "attempt",
    "fetch",
    "mask_device",
    "pays",
    "send",
    "table",
]

TABLE = "dispatch.json"
LEAST_WORK = 1 << 24  # multiply-adds: a CPU does fewer in less time than any copy takes
Result = TypeVar("Result")


@dataclass(frozen=True)
class Rates:
    """Multiply-adds a second of an op: of one thread of the CPU, and of the device."""

    host: float
    device: float


@dataclass(frozen=True)
class Table:
    """What choices are made by; fields as in ``dispatch.json``."""

    measured: dict[str, Any] | None  # machine, date and commit
    call_seconds: float
    link_bytes_per_second: float
    margin: float
    mask_elements: int
    ops: dict[str, Rates]

    @classmethod
    def of(cls, found: dict[str, Any]) -> Table:
        """The table of a file's content."""
        return cls(**{**found, "ops": {op: Rates(**rates) for op, rates in found["ops"].items()}})


@functools.cache
def table() -> Table:
    """The one in force."""
    from importlib import resources  # only those who ask need it

    return Table.of(json.loads(resources.files(bitnet_ext.gpu).joinpath(TABLE).read_text()))


def pays(table: Table, op: str, work: float, nbytes: float, threads: int) -> bool:
    """Whether the device wins, with ``nbytes`` copied there and back for ``work`` multiply-adds."""
    rates = table.ops[op]
    on_host = work / (rates.host * threads)
    copies = table.call_seconds + nbytes / table.link_bytes_per_second
    return table.margin * (copies + work / rates.device) < on_host


def attempt(wanted: str, work: Callable[[Device], Result]) -> Result | None:
    """``work`` on the current device; None where it is only "auto" that asked for one, and there is
    none, or it lacks the room or does not take the shapes: the CPU's turn.

    Raises:
        DeviceUnavailableError: ``wanted`` is "cuda" and not there, or no device's name.
    """
    check(wanted)
    try:
        return work(devices.cuda_device())
    except (DeviceUnavailableError, InvalidShapeError, MemoryError):
        if wanted == "cuda":
            raise
        return None


def check(wanted: str) -> None:
    """Raise DeviceUnavailableError for a name that is none of "auto", "cpu" and "cuda"."""
    if wanted not in ("auto", "cpu", "cuda"):
        raise DeviceUnavailableError(f"device: found {wanted!r}, wanted 'auto', 'cpu' or 'cuda'")


def mask_device(elements: int) -> bool:
    """Whether a mask of so many elements is made on a device: it is large, and there is one."""
    if elements <= table().mask_elements:
        return False
    try:
        devices.cuda_device()
    except DeviceUnavailableError:
        return False
    return True


def send(device: Device, array: npt.NDArray[Any]) -> Any:
    """A copy on the device, counted."""
    start = time.perf_counter()
    copy = device.to_device(np.ascontiguousarray(array))
    metrics.add_copy(device.capability, array.nbytes, time.perf_counter() - start)
    return copy


def fetch(device: Device, array: Any) -> npt.NDArray[Any]:
    """A copy on the host, counted; waits for the work before it."""
    start = time.perf_counter()
    copy = device.to_host(array)
    metrics.add_copy(device.capability, copy.nbytes, time.perf_counter() - start)
    return copy
