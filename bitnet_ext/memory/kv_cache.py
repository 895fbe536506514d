"""The paged key/value cache of one batch of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.arguments import lengths_to_keep, sequences_to_select
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CacheFullError
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.interchange import to_host
from bitnet_ext.memory.device_store import DeviceStore

__all__ = ["KVCache", "KvDtype"]

KvDtype = Literal["f32", "f16", "int8"]


class KVCache:
    """Keys and values of ``batch_size`` sequences, in pages of 64 tokens grown as needed
    (on a CUDA device, in slots of ``max_seq_len``).

    ``tokens`` lists the ids that each sequence holds, so that a caller can tell a common prefix.
    A cache serves one call at a time; a second concurrent call raises RuntimeError.
    """

    def __init__(
        self,
        config: BitNetConfig,
        batch_size: int,
        max_seq_len: int,
        kv_dtype: KvDtype = "f32",
        device: Device | None = None,
    ) -> None:
        """An empty cache in host memory, or in that of ``device``, all of it reserved at once."""
        shape = config.num_layers, batch_size, config.num_kv_heads, config.head_dim, config.head_dim
        self._config = config
        self._core: _core.KVCache | DeviceStore
        if device is None:
            self._core = _core.KVCache(*shape, max_seq_len, kv_dtype)
        else:
            self._core = DeviceStore(device, *shape, max_seq_len, kv_dtype)
        self._max_seq_len = max_seq_len
        self._kv_dtype: KvDtype = kv_dtype
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def device(self) -> str:
        """Where it is: "cpu" or "cuda"."""
        return "cuda" if isinstance(self._core, DeviceStore) else "cpu"

    @property
    def batch_size(self) -> int:
        """Sequences in the cache."""
        return len(self.tokens)

    @property
    def length(self) -> npt.NDArray[np.int32]:
        """Tokens held by each sequence, int32 [B] (a copy)."""
        return self._core.lengths

    @property
    def max_seq_len(self) -> int:
        """Tokens that each sequence may hold."""
        return self._max_seq_len

    @property
    def kv_dtype(self) -> KvDtype:
        """Storage of keys and values."""
        return self._kv_dtype

    @property
    def nbytes(self) -> int:
        """Bytes reserved so far; pages are added as sequences grow."""
        return self._core.nbytes_reserved

    def reset(self) -> None:
        """Forget every token; the pages stay reserved."""
        self.truncate(0)

    def truncate(self, n: int | Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Keep the first ``n`` tokens of each sequence (one number, or one per sequence).

        Raises:
            InvalidShapeError: a negative number, or the wrong count of numbers.
        """
        keep = lengths_to_keep(to_host("n", n), self.batch_size)
        lengths = np.minimum(keep, self.length).astype(np.int32)
        self._core.truncate(lengths)
        for held, length in zip(self.tokens, lengths, strict=True):
            del held[length:]

    def select(self, rows: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Reorder, drop or duplicate sequences: sequence i becomes the old ``rows[i]``.

        Raises:
            InvalidShapeError: an index outside the batch.
        """
        index = sequences_to_select(to_host("rows", rows), self.batch_size)
        self._core.select(index.astype(np.int32))
        self.tokens = [list(self.tokens[row]) for row in index]

    def copy(self) -> KVCache:
        """An independent cache with the same tokens."""
        twin = object.__new__(KVCache)
        twin._config = self._config
        twin._core = self._core.copy()
        twin._max_seq_len = self._max_seq_len
        twin._kv_dtype = self._kv_dtype
        twin.tokens = [list(held) for held in self.tokens]
        return twin

    def check_room(self, counts: npt.NDArray[np.int32]) -> None:
        """Raise CacheFullError unless every sequence can take ``counts`` more tokens."""
        lengths = self.length
        over = np.flatnonzero(lengths.astype(np.int64) + counts > self._max_seq_len)
        if over.size:
            i = int(over[0])
            raise CacheFullError(
                f"cache: sequence {i} holds {lengths[i]} of {self._max_seq_len} tokens, "
                f"wanted room for {counts[i]} more; make it with a larger max_seq_len"
            )

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("a KVCache does not pickle; pickle the token ids and prefill again")
