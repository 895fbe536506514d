"""Intermediates of one call, reused across layers and calls."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig

__all__ = [
    "FULL_BLOCK_ROWS",
    "PREFILL_BLOCK_ROWS",
    "Workspace",
    "WorkspacePool",
    "block_rows",
    "empty_array",
    "workspace_bytes",
]

Float32 = npt.NDArray[np.float32]
_LINE = 64
_PAGE = 4096

# Rows worked on at a time. A prompt's: two tasks of the matrix kernels, one for either of two
# threads. A whole forward's: few enough that with all logits it needs less than half the memory of
# a step loop.
PREFILL_BLOCK_ROWS = 512
FULL_BLOCK_ROWS = 256


def empty_array(shape: tuple[int, ...], dtype: Any = np.float32) -> npt.NDArray[Any]:
    """An array on whole cache lines in counted memory.

    Raises:
        MemoryError: the memory limit or the system refuses.
    """
    count = int(np.prod(shape, dtype=np.int64))
    if count == 0:
        return np.empty(shape, dtype)
    buffer = _core.Buffer(count * np.dtype(dtype).itemsize)
    return np.frombuffer(memoryview(buffer), dtype, count).reshape(shape)


class Workspace:
    """Buffers for blocks of up to ``rows`` rows: the residual stream, and what layers write; logits
    once a step asks for them."""

    def __init__(self, config: BitNetConfig, rows: int) -> None:
        self.rows = rows
        self._vocab_size = config.vocab_size
        self._logits: Float32 | None = None
        self._hidden = empty_array((rows, config.hidden_size))
        self.buffers = _core.LayerBuffers(
            normed=empty_array((rows * config.hidden_size if config.linear_norm else 0,)),
            wide=empty_array((rows * _wide_floats(config),)),
            codes=empty_array((rows * _quantised_width(config),), np.int8),
            scales=empty_array((rows,)),
            tops=empty_array((rows,), np.int32),
        )

    def hidden(self, rows: int) -> Float32:
        """The first rows of the residual stream, [rows, E]."""
        return self._hidden[:rows]

    def logits(self, rows: int) -> Float32:
        """The first rows of the logits, [rows, V], kept from step to step."""
        if self._logits is None or len(self._logits) < rows:
            self._logits = None  # before there are more
            self._logits = empty_array((rows, self._vocab_size))
        return self._logits[:rows]

    def release_logits(self) -> bool:
        """Give the memory of the logits back; whether there were any."""
        found, self._logits = self._logits, None
        return found is not None


class WorkspacePool:
    """Leases workspaces: each concurrent call has its own, a lone caller always the same."""

    def __init__(self, config: BitNetConfig) -> None:
        self._config = config
        self._free: list[Workspace] = []
        self._lock = threading.Lock()

    @contextmanager
    def lease(self, rows: int) -> Iterator[Workspace]:
        """A workspace for blocks of at least ``rows`` rows, exclusively the caller's."""
        with self._lock:
            fitting = [w for w in self._free if w.rows >= rows]
            chosen = min(fitting, key=lambda w: w.rows) if fitting else None
            if chosen is not None:
                self._free.remove(chosen)
            else:
                # Too small for this caller: give their memory back before taking more.
                self._free.clear()
        workspace = chosen or Workspace(self._config, rows)
        try:
            yield workspace
        finally:
            with self._lock:
                self._free.append(workspace)

    def clear(self) -> None:
        """Give unused workspaces back to the system."""
        with self._lock:
            self._free.clear()

    def release_logits(self) -> bool:
        """Give the logits of unused workspaces back to the system; whether there were any."""
        with self._lock:
            return any([w.release_logits() for w in self._free])

    @property
    def held_bytes(self) -> int:
        """Bytes of the workspaces that nobody leases now, without their logits."""
        with self._lock:
            return sum(workspace_bytes(self._config, w.rows) for w in self._free)


def _wide_floats(config: BitNetConfig) -> int:
    qkv_and_attention = 2 * config.q_size + 2 * config.kv_size
    return max(qkv_and_attention, (2 if config.gated_ffn else 1) * config.intermediate_size)


def _quantised_width(config: BitNetConfig) -> int:
    return max(config.hidden_size, config.q_size, config.intermediate_size)


def workspace_bytes(config: BitNetConfig, rows: int) -> int:
    """Bytes of a workspace of ``rows`` rows."""
    floats = _wide_floats(config) + config.hidden_size * (2 if config.linear_norm else 1) + 2
    return rows * (4 * floats + _quantised_width(config)) + 6 * _LINE


def block_rows(config: BitNetConfig, wanted: int, other_bytes: int, held_bytes: int) -> int:
    """At most ``wanted`` rows of a block, so that it and ``other_bytes`` fit the memory limit.

    ``held_bytes`` are counted now but free for reuse.

    Raises:
        MemoryError: not even one row fits; the message says how much is missing.
    """
    wanted = max(1, wanted)
    stats = _core.memory_stats()
    if not stats["limit"]:
        return wanted
    available = stats["limit"] - stats["current"] + held_bytes - other_bytes
    per_row = workspace_bytes(config, 2) - workspace_bytes(config, 1)
    fixed = workspace_bytes(config, 1) - per_row + 8 * _PAGE  # each buffer is a number of pages
    rows = (available - fixed) // per_row
    if rows < 1:
        raise MemoryError(
            f"memory limit of {stats['limit']} bytes: {stats['current'] - held_bytes} are in use, "
            f"and this call needs at least {other_bytes + fixed + per_row} more; raise the limit, "
            "or pass fewer tokens at a time"
        )
    return int(min(wanted, rows))
