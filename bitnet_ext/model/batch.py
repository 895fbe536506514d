"""Token ids of any accepted form, as the packed rows that the layers work on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.interchange import is_array, to_host

__all__ = ["Rows", "TokenBatch"]

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Some rows of a ragged batch, sequence after sequence, without padding."""

    ids: Int32  # [M]
    seq: Int32  # [M] sequence of each row
    pos: Int32  # [M] absolute position of each row
    starts: Int32  # [B + 1] first row of each sequence
    first_pos: Int32  # [B] position of each sequence's first row
    kept: Int32 | None = None  # [B] last rows of each whose results are wanted; None: all

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def one_each(
        cls, ids: Int32, mask: npt.NDArray[np.bool_], counts: Int32, lengths: Int32
    ) -> Rows:
        """The next token of each sequence that ``mask`` marks (``counts`` 1, else 0)."""
        seq = np.flatnonzero(mask).astype(np.int32)
        starts = np.zeros(len(mask) + 1, np.int32)
        np.cumsum(counts, out=starts[1:])
        return cls(ids[seq], seq, lengths[seq], starts, lengths)


@dataclass(frozen=True)
class TokenBatch:
    """Ragged token ids: ``ids`` holds the sequences one after the other."""

    ids: Int32  # [M]
    counts: Int32  # [B] tokens of each sequence
    form: Literal["single", "batch", "list"]
    width: int  # T of a [B, T] input, else the longest sequence

    @classmethod
    def of(
        cls, token_ids: Any, lengths: Any, vocab_size: int, *, as_list: bool = False
    ) -> TokenBatch:
        """Read ``[T]``, ``[B, T]`` (with ``lengths [B]``) or a ragged list of id lists.

        Arrays may be of any library with DLPack; those on a device are copied to the host.
        ``as_list`` takes ``token_ids`` for a list of sequences even when all are equally long.

        Raises:
            InvalidShapeError: not integers, wrong rank, an id outside the vocabulary, or lengths
                that do not fit.
        """
        parts = _sequences(token_ids)
        if parts is not None and (as_list or len({len(part) for part in parts}) != 1):
            if lengths is not None:
                raise InvalidShapeError("lengths: found with a ragged list, wanted None")
            arrays = [_int_array(part, f"token_ids[{i}]", 1) for i, part in enumerate(parts)]
            counts = np.array([len(array) for array in arrays], np.int32)
            flat = np.concatenate(arrays) if arrays else np.empty(0, np.int64)
            return cls(_checked(flat, vocab_size), counts, "list", int(counts.max(initial=0)))
        array = _int_array(token_ids if parts is None else parts, "token_ids", None)
        if array.ndim == 1:
            if lengths is not None:
                raise InvalidShapeError("lengths: found with 1-D token_ids, wanted None")
            return cls(
                _checked(array, vocab_size), np.array([len(array)], np.int32), "single", len(array)
            )
        if array.ndim != 2:
            raise InvalidShapeError(f"token_ids: found shape {array.shape}, wanted [T] or [B, T]")
        batch, width = array.shape
        counts = _lengths(lengths, batch, width)
        keep = np.arange(width) < counts[:, None]
        return cls(_checked(array[keep], vocab_size), counts, "batch", width)

    def rows(
        self, past: Int32, limit: int, kept: Int32 | None = None
    ) -> Iterator[tuple[int, Rows]]:
        """Yield (offset, rows) blocks of at most ``limit`` rows, in order; ``past`` [B].

        ``kept`` [B]: only results of that many last tokens of each sequence are wanted.
        """
        if kept is not None and np.array_equal(kept, self.counts):
            kept = None
        ends = np.cumsum(self.counts, dtype=np.int64)
        begins = ends - self.counts
        seq = np.repeat(np.arange(len(self.counts), dtype=np.int32), self.counts)
        pos = (np.arange(len(self.ids)) - begins[seq] + past[seq]).astype(np.int32)
        for low in range(0, len(self.ids), limit):
            high = min(low + limit, len(self.ids))
            starts = np.empty(len(self.counts) + 1, np.int32)
            starts[:-1] = np.clip(begins, low, high) - low
            starts[-1] = high - low
            first = (np.clip(low - begins, 0, self.counts) + past).astype(np.int32)
            wanted = None
            if kept is not None:
                wanted = np.clip(ends, low, high) - np.clip(ends - kept, low, high)
                wanted = wanted.astype(np.int32)
            part = slice(low, high)
            yield low, Rows(self.ids[part], seq[part], pos[part], starts, first, wanted)


def _sequences(token_ids: Any) -> list[Any] | None:
    """Those of a list of sequences, arrays among them on the host."""
    if not isinstance(token_ids, (list, tuple)):
        return None
    if not all(isinstance(part, (list, tuple)) or is_array(part) for part in token_ids):
        return None
    return [
        to_host(f"token_ids[{i}]", part) if is_array(part) else part
        for i, part in enumerate(token_ids)
    ]


def _int_array(values: Any, name: str, ndim: int | None) -> npt.NDArray[np.int64]:
    array = to_host(name, values)
    if array.size == 0 and array.dtype.kind == "f":
        array = array.astype(np.int64)  # np.asarray([]) is float64
    if array.dtype.kind not in "iu" or (ndim is not None and array.ndim != ndim):
        raise InvalidShapeError(
            f"{name}: found {array.dtype} {array.shape}, wanted integers of shape "
            f"{'[T]' if ndim == 1 else '[T] or [B, T]'}"
        )
    return array.astype(np.int64, copy=False)


def _lengths(lengths: Any, batch: int, width: int) -> Int32:
    if lengths is None:
        return np.full(batch, width, np.int32)
    counts = _int_array(lengths, "lengths", 1)
    if counts.shape != (batch,) or (batch and (counts.min() < 0 or counts.max() > width)):
        raise InvalidShapeError(
            f"lengths: found {counts.tolist()}, wanted {batch} values from 0 to {width}"
        )
    return counts.astype(np.int32)


def _checked(ids: npt.NDArray[np.int64], vocab_size: int) -> Int32:
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = int(ids[(ids < 0) | (ids >= vocab_size)][0])
        raise InvalidShapeError(f"token_ids: found id {bad}, wanted 0 to {vocab_size - 1}")
    return np.ascontiguousarray(ids, np.int32)
