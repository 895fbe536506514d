"""The key/value cache of a batch of sequences in device memory, and the rows of a call.

A call that adds tokens goes, layer by layer, ``append`` (kv_append.py), ``attend`` (attend.py), and
after the last layer ``advance``.  Kernels read lengths, pages and active flags from device memory,
so that one captured decode step serves every position; its replays are followed by ``note``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.arguments import lengths_to_keep, sequences_to_select
from bitnet_ext.errors import CacheFullError
from bitnet_ext.gpu.device import Device

__all__ = ["DeviceCache", "DeviceRows"]

Int32 = npt.NDArray[np.int32]

_DTYPES = {"f32": np.float32, "f16": np.float16, "int8": np.int8}
_BLOCK = 64  # tokens; pages are a multiple of it


@dataclass(frozen=True)
class DeviceRows:
    """Rows of a ragged batch, sequence after sequence.

    Row i of a sequence stands at position ``lengths[b] + i``, lengths being the cache's.
    """

    count: int  # rows in all
    longest: int  # most rows of one sequence
    sequence: Any = None  # int32 [count] on the device; None: row b is sequence b's
    starts: Any = None  # int32 [B + 1] on the device, first row of each sequence; None as above
    active: Any = None  # bool [B] on the device: sequences that take part; None: all

    @classmethod
    def one_each(cls, batch: int, active: Any = None) -> DeviceRows:
        """The next token of each sequence; where ``active`` (bool [B], on the device) is false,
        nothing is appended and attention gives zeros."""
        return cls(batch, 1, active=active)

    @classmethod
    def ragged(cls, device: Device, counts: npt.ArrayLike) -> DeviceRows:
        """``counts[b]`` rows of each sequence; copies their layout to the device."""
        held = np.asarray(counts, np.int32)
        starts = np.zeros(len(held) + 1, np.int32)
        np.cumsum(held, out=starts[1:])
        sequence = np.repeat(np.arange(len(held), dtype=np.int32), held)
        return cls(
            int(starts[-1]),
            int(held.max(initial=0)),
            device.to_device(sequence),
            device.to_device(starts),
        )


class DeviceCache:
    """Keys and values of ``batch_size`` sequences, in slots of ``max_seq_len`` tokens.

    Slots stand behind a page table with one page each (paged.cuh has the layout).  The length of
    each sequence is on the device, where kernels read and advance it, and mirrored on the host.

    Attributes:
        keys, values: ``[layers, slots, kv_heads, page_tokens, width]``, width: the head dimension
            rounded up to 16 bytes.
        key_scales, value_scales: float32 ``[layers, slots, kv_heads, page_tokens]``, int8 only.
        lengths: int32 [B] on the device.
        table: int32 [B, 1] on the device: the slot of each sequence.
    """

    def __init__(
        self,
        device: Device,
        layers: int,
        batch_size: int,
        kv_heads: int,
        dk: int,
        dv: int,
        max_seq_len: int,
        kv_dtype: Literal["f32", "f16", "int8"] = "f32",
    ) -> None:
        self.device = device
        self.layers, self.kv_heads, self.dk, self.dv = layers, kv_heads, dk, dv
        self.max_seq_len = max_seq_len
        self.kv_dtype: Literal["f32", "f16", "int8"] = kv_dtype
        self.page_tokens = max(1, -(-max_seq_len // _BLOCK)) * _BLOCK
        self._allocate(batch_size)
        self._put(np.arange(batch_size), np.zeros(batch_size, np.int32))

    def _allocate(self, slots: int) -> None:
        dtype = np.dtype(_DTYPES[self.kv_dtype])
        shape = (self.layers, slots, self.kv_heads, self.page_tokens)
        each = 16 // dtype.itemsize
        self.keys = self.device.empty((*shape, -(-self.dk // each) * each), dtype)
        self.values = self.device.empty((*shape, -(-self.dv // each) * each), dtype)
        scales = shape if self.kv_dtype == "int8" else (self.layers, 0)
        self.key_scales = self.device.empty(scales, np.float32)
        self.value_scales = self.device.empty(scales, np.float32)

    def _put(self, slots: npt.ArrayLike, lengths: Int32) -> None:
        self._slots = np.asarray(slots, np.int32)
        self._lengths = lengths
        self.lengths = self.device.to_device(lengths)
        self.table = self.device.to_device(self._slots[:, None])

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self._lengths)

    @property
    def length(self) -> Int32:
        """Tokens held by each sequence, int32 [B] (a copy of the host's mirror)."""
        return self._lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes reserved on the device."""
        arrays = (self.keys, self.values, self.key_scales, self.value_scales)
        return sum(int(array.nbytes) for array in arrays)

    def check_room(self, counts: npt.ArrayLike) -> None:
        """Raise CacheFullError unless every sequence can take ``counts`` [B] more tokens."""
        after = self._lengths.astype(np.int64) + np.asarray(counts)
        over = np.flatnonzero(after > self.max_seq_len)
        if len(over):
            i = int(over[0])
            raise CacheFullError(
                f"cache: found {self._lengths[i]} of {self.max_seq_len} tokens in sequence {i}, "
                f"wanted room for {after[i] - self._lengths[i]} more; make it with a larger "
                "max_seq_len"
            )

    def note(self, counts: npt.ArrayLike) -> None:
        """The device has appended ``counts`` [B] tokens: the host's mirror follows."""
        self.check_room(counts)
        self._lengths = (self._lengths + np.asarray(counts)).astype(np.int32)

    def reset(self) -> None:
        """Forget every token."""
        self.truncate(0)

    def truncate(self, n: int | Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Keep the first ``n`` tokens of each sequence (one number, or one per sequence).

        Raises:
            InvalidShapeError: a negative number, or the wrong count of numbers.
        """
        keep = lengths_to_keep(n, self.batch_size)
        self._lengths = np.minimum(keep, self._lengths).astype(np.int32)
        self.lengths[...] = self.device.to_device(self._lengths)

    def select(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Reorder, drop or duplicate sequences: sequence i becomes the old ``rows[i]``.

        Without duplicates only the table changes.  Arrays may be replaced: capture graphs again.

        Raises:
            InvalidShapeError: an index outside the batch.
        """
        index = sequences_to_select(rows, self.batch_size)
        index = index.astype(np.int64)
        slots, lengths = self._slots[index], self._lengths[index]
        if len(set(slots.tolist())) < len(slots):
            slots = self._gather(slots)
        self._put(slots, lengths)

    def copy(self) -> DeviceCache:
        """An independent cache with the same tokens."""
        twin: DeviceCache = object.__new__(DeviceCache)
        twin.__dict__.update(self.__dict__)
        twin._put(twin._gather(self._slots), self._lengths.copy())
        return twin

    def _gather(self, slots: Int32) -> Int32:
        """New arrays whose slots are copies of those listed; their numbers."""
        old = self.keys, self.values, self.key_scales, self.value_scales
        self._allocate(len(slots))
        new = self.keys, self.values, self.key_scales, self.value_scales
        for to, source in zip(new, old, strict=True):
            if source.ndim > 2:
                for i, slot in enumerate(slots.tolist()):
                    to[:, i] = source[:, slot]
        return np.arange(len(slots), dtype=np.int32)
