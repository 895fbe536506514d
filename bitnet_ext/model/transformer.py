"""Full forward, chunked prefill and decode; the conductor of the kernels.

Every path runs the same layer code over blocks of packed rows, and every kernel gives a row the
same bits whatever its block, so all paths agree bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import ContextLengthError, InvalidShapeError
from bitnet_ext.gpu import metrics
from bitnet_ext.gpu.attend import Precision
from bitnet_ext.gpu.device import device_of
from bitnet_ext.gpu.interchange import to_host
from bitnet_ext.memory.kv_cache import KVCache, KvDtype
from bitnet_ext.model.batch import TokenBatch
from bitnet_ext.model.device_engine import DeviceEngine
from bitnet_ext.model.engine import Engine, Largest
from bitnet_ext.model.load import Weights

__all__ = ["Transformer"]

Float32 = npt.NDArray[np.float32]


class Transformer:
    """A ternary transformer on the CPU or a CUDA device: weights, and ways to run tokens.

    Token ids, lengths and the like may be arrays of NumPy, CuPy or another library with DLPack.
    Those on a device are copied to the host, but for a decode step's ids there. On a CUDA device
    logits are CuPy's arrays; every other result is NumPy's.
    """

    _engine: Engine | DeviceEngine

    def __init__(
        self,
        config: BitNetConfig,
        weights: Weights,
        kv_dtype: KvDtype = "f32",
        device: Literal["cpu", "cuda"] = "cpu",
        precision: Precision = "f32",
    ) -> None:
        if precision != "f32" and device == "cpu":
            raise InvalidShapeError(f"precision: found {precision!r} on the CPU, wanted 'f32'")
        self.config = config
        if device == "cpu":
            self._engine = Engine(config, weights, kv_dtype)
        else:
            self._engine = DeviceEngine(config, weights, kv_dtype, precision)

    @property
    def device(self) -> str:
        """Where the model runs: "cpu" or "cuda"."""
        return self._engine.device

    def new_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> KVCache:
        """An empty cache; pages are reserved as sequences grow.

        Raises:
            ContextLengthError: ``max_seq_len`` exceeds the model's context.
            InvalidShapeError: a size that is not positive.
        """
        context = self.config.max_position_embeddings
        wanted = context if max_seq_len is None else max_seq_len
        if batch_size < 1 or wanted < 1:
            raise InvalidShapeError(
                f"batch_size, max_seq_len: found {batch_size}, {wanted}, wanted positive integers"
            )
        if wanted > context:
            raise ContextLengthError(
                f"max_seq_len: found {wanted}, the model's context is {context}"
            )
        return self._engine.new_cache(batch_size, wanted)

    # --- full sequences --------------------------------------------------------------------

    def forward_full(
        self,
        token_ids: Any,
        lengths: Any = None,
        logits_to_keep: int = 0,
        out: Any = None,
    ) -> Any:
        """Logits of every position, all positions through each layer at once.

        Args:
            token_ids: int [T], [B, T], or a list of id lists that differ in length.
            lengths: int [B], valid tokens of each row of a [B, T] input.
            logits_to_keep: only the last n positions of each sequence; 0 keeps all.
            out: float32 array of the result's shape to write into.

        Returns:
            float32 [T, V], [B, T, V] (rows past ``lengths`` are zero), or a list of [T_i, V].

        Raises:
            InvalidShapeError: bad ids, shapes or ``out``.
            ContextLengthError: more tokens than the model's context.
            MemoryError: the memory limit leaves no room for even one row.
        """
        batch = self._tokens(token_ids, lengths)
        if not isinstance(logits_to_keep, int) or logits_to_keep < 0:
            raise InvalidShapeError(f"logits_to_keep: found {logits_to_keep!r}, wanted 0 or more")
        kept = np.minimum(batch.counts, logits_to_keep) if logits_to_keep else batch.counts
        width = min(batch.width, logits_to_keep) if logits_to_keep else batch.width
        vocab = self.config.vocab_size
        shape: tuple[int, ...] = {
            "single": (width, vocab),
            "batch": (len(kept), width, vocab),
            "list": (int(kept.sum()), vocab),
        }[batch.form]
        to = self._target(out, shape, batch.form)
        with self._mode("full"):
            result = self._engine.full(batch, kept, shape, to)
        if batch.form != "list":
            return result if out is None else out
        ends = np.cumsum(kept).tolist()
        return [result[end - keep : end] for end, keep in zip(ends, kept.tolist(), strict=True)]

    def forward_incremental(self, token_ids: Any, lengths: Any = None) -> Any:
        """The result of :meth:`forward_full`, computed one token a step through the KV cache."""
        batch = self._tokens(token_ids, lengths)
        vocab = self.config.vocab_size
        begins = np.cumsum(batch.counts) - batch.counts
        result = self._engine.empty((len(batch.counts), batch.width, vocab))
        cache = self.new_cache(len(batch.counts), batch.width)
        for t in range(batch.width):
            active = batch.counts > t
            ids = np.zeros(len(batch.counts), np.int32)
            ids[active] = batch.ids[begins[active] + t]
            logits = self.decode(ids, cache, active=active)
            for row in np.flatnonzero(active).tolist():
                result[row, t] = logits[row]
        if batch.form == "single":
            return result[0]
        if batch.form == "list":
            return [row[:count] for row, count in zip(result, batch.counts, strict=True)]
        return result

    def token_logprobs(
        self, sequences: Sequence[Any], first: Sequence[int] | None = None
    ) -> list[tuple[Float32, npt.NDArray[np.bool_]]]:
        """Natural-log probability of tokens given all before them, without a [T, V] buffer.

        Args:
            sequences: lists of ids, each one to context + 1 long (the last one is not run).
            first: index of each sequence's first token to score, 1 to T; default 1.

        Returns:
            For each sequence ``(logprob float32 [T - first], is_greedy bool [T - first])``.
        """
        vocab = self.config.vocab_size
        arrays = [to_host(f"sequences[{i}]", ids) for i, ids in enumerate(sequences)]
        whole = TokenBatch.of(arrays, None, vocab, as_list=True)
        begins = np.ones(len(arrays), np.int32)
        if first is not None:
            begins = to_host("first", first).astype(np.int32)
        kept = whole.counts - begins
        if len(begins) != len(arrays) or (begins < 1).any() or (kept < 0).any():
            raise InvalidShapeError(
                f"first: found {begins.tolist()}, wanted 1 to {whole.counts.tolist()}"
            )
        logprobs = np.empty(int(kept.sum()), np.float32)
        greedy = np.empty(len(logprobs), np.bool_)
        if len(logprobs):
            targets = np.concatenate([a[n:] for a, n in zip(arrays, begins, strict=True)])
            batch = self._tokens([a[:-1] for a in arrays], None, as_list=True)
            with self._mode("full"):
                self._engine.logprobs(batch, kept, targets.astype(np.int32), logprobs, greedy)
        cuts = np.cumsum(kept)[:-1]
        return list(zip(np.split(logprobs, cuts), np.split(greedy, cuts), strict=True))

    # --- with a cache ----------------------------------------------------------------------

    def prefill(
        self,
        token_ids: Any,
        cache: KVCache,
        lengths: Any = None,
        chunk_size: int | None = None,
        out: Any = None,
    ) -> Any:
        """Append whole prompts to the cache; logits of each sequence's last position.

        Args:
            token_ids: int [T], [B, T] or a ragged list; B is the cache's batch size.
            cache: may hold tokens already.
            lengths: int [B], valid tokens of each row of a [B, T] input.
            chunk_size: rows worked on at a time; never changes a bit of the result.
            out: float32 [B, V] ([V] for 1-D ids) to write into.

        Returns:
            float32 [B, V] ([V] for 1-D ids); NaN for sequences without new tokens.

        Raises:
            InvalidShapeError: bad ids or shapes, no tokens at all.
            CacheFullError: a sequence has no room; the cache is unchanged, as after any error.
            MemoryError: the memory limit leaves no room for even one row.
        """
        batch = self._tokens(token_ids, lengths)
        if len(batch.counts) != cache.batch_size:
            raise InvalidShapeError(
                f"token_ids: found {len(batch.counts)} sequences, the cache has {cache.batch_size}"
            )
        if chunk_size is not None and chunk_size < 1:
            raise InvalidShapeError(f"chunk_size: found {chunk_size}, wanted a positive integer")
        vocab = self.config.vocab_size
        shape = (vocab,) if batch.form == "single" else (len(batch.counts), vocab)
        to = self._target(out, shape)
        with self._mode("full"), self._appending(cache, batch.counts, batch.ids):
            result = self._engine.prefill(batch, cache, chunk_size, shape, to)
        return result if out is None else out

    def decode(
        self,
        token_ids: Any,
        cache: KVCache,
        active: Any = None,
        out: Any = None,
    ) -> Any:
        """Append one token to each sequence; logits of the next.

        Args:
            token_ids: int [B].
            active: bool [B]; rows that are False are skipped, their cache and ``out`` rows
                unchanged (NaN when ``out`` is not given).
            out: float32 [B, V] to write into; then a step allocates nothing.

        Raises:
            InvalidShapeError, CacheFullError: as :meth:`prefill`; the cache is unchanged.
        """
        return self._decode(token_ids, cache, active, out, None)

    def decode_largest(
        self,
        token_ids: Any,
        cache: KVCache,
        k: int,
        *,
        keep: Sequence[npt.NDArray[np.int32]] | None = None,
        active: Any = None,
        out: Any = None,
    ) -> Any:
        """:meth:`decode`, its bits, for the k largest logits alone: others may be -inf.

        Every logit equal to the k-th is there too. Large vocabularies are read through an int8
        copy with a proven bound, made on the first call where the memory limit leaves room.

        Args:
            token_ids, cache, active, out: as :meth:`decode`.
            k: how many, 1 to V.
            keep: for each sequence int32 [n], ids whose logits are wanted whatever they are; they
                count for none of the k.

        Raises:
            InvalidShapeError: ``k`` outside 1..V, ``keep`` of another length than the batch; as
                :meth:`decode` otherwise.
        """
        self._check_k(k)
        kept = [np.empty(0, np.int32)] * cache.batch_size
        if keep is not None:
            kept = [to_host(f"keep[{i}]", ids) for i, ids in enumerate(keep)]
        if len(kept) != cache.batch_size:
            raise InvalidShapeError(f"keep: found {len(kept)} arrays, wanted {cache.batch_size}")

        return self._decode(token_ids, cache, active, out, Largest(k, kept))

    def decode_topk(self, token_ids: Any, cache: KVCache, k: int) -> tuple[Any, Any]:
        """:meth:`decode`, and of its logits only the k largest, exactly; ties: lowest id.

        Returns:
            (ids int32 [B, k], logits float32 [B, k]), largest first.

        Raises:
            InvalidShapeError: ``k`` outside 1..V, or above 4096 on a CUDA device; as
                :meth:`decode` otherwise.
        """
        self._check_k(k)
        with self._stepping(token_ids, cache, None) as (ids, mask):
            return self._engine.decode_topk(ids, mask, cache, k)

    def _decode(
        self, token_ids: Any, cache: KVCache, active: Any, out: Any, largest: Largest | None
    ) -> Any:
        shape = (cache.batch_size, self.config.vocab_size)
        to = self._target(out, shape)
        with self._stepping(token_ids, cache, active) as (ids, mask):
            result = self._engine.decode(ids, mask, cache, shape, to, largest)
        return result if out is None else out

    @contextmanager
    def _stepping(
        self, token_ids: Any, cache: KVCache, active: Any
    ) -> Iterator[tuple[Any, npt.NDArray[np.bool_]]]:
        """Checked ids [B] and the sequences that take one, which they keep if all goes well."""
        ids, mask = self._decode_inputs(token_ids, cache, active)
        known = ids[mask] if device_of(ids) is None else np.full(mask.sum(), -1, np.int32)
        with self._mode("incremental"), self._appending(cache, mask.astype(np.int32), known):
            yield ids, mask

    # --- inside ----------------------------------------------------------------------------

    def _tokens(self, token_ids: Any, lengths: Any, as_list: bool = False) -> TokenBatch:
        batch = TokenBatch.of(token_ids, lengths, self.config.vocab_size, as_list=as_list)
        if len(batch.ids) == 0:
            raise InvalidShapeError("token_ids: found no tokens, wanted at least one")
        context = self.config.max_position_embeddings
        if batch.width > context and int(batch.counts.max()) > context:
            raise ContextLengthError(
                f"token_ids: found {int(batch.counts.max())} tokens, the model's context is "
                f"{context}"
            )
        return batch

    @contextmanager
    def _mode(self, mode: Literal["full", "incremental"]) -> Iterator[None]:
        _core.set_mode(mode)
        before = metrics.MODE.set(mode)
        try:
            yield
        finally:
            metrics.MODE.reset(before)
            _core.set_mode("op")

    @contextmanager
    def _appending(
        self, cache: KVCache, counts: npt.NDArray[np.int32], ids: npt.NDArray[np.int32]
    ) -> Iterator[None]:
        """Commit ``counts`` new tokens when the block succeeds, else leave the cache as it was."""
        if cache.device != self.device:
            raise InvalidShapeError(f"cache: found one on {cache.device}, wanted {self.device}")
        with cache._core.lease():
            cache.check_room(counts)
            before = cache.length
            try:
                cache._core.reserve((before + counts).astype(np.int32))
                yield
            except BaseException:  # also KeyboardInterrupt: the cache must not keep half a call
                cache._core.truncate(before)
                raise
            cache._core.advance(counts)
            begin = 0
            for held, count in zip(cache.tokens, counts.tolist(), strict=True):
                held.extend(ids[begin : begin + count].tolist())
                begin += count

    def _decode_inputs(
        self, token_ids: Any, cache: KVCache, active: Any
    ) -> tuple[Any, npt.NDArray[np.bool_]]:
        batch = cache.batch_size
        ids: Any = None if self.device == "cpu" else self._engine.adopt("token_ids", token_ids)
        here = ids is not None  # then it stays there
        if not here:
            ids = to_host("token_ids", token_ids)
        if ids.dtype.kind not in "iu" or ids.shape != (batch,):
            raise InvalidShapeError(
                f"token_ids: found {ids.dtype} {ids.shape}, wanted integers of shape ({batch},)"
            )
        mask = np.ones(batch, bool) if active is None else to_host("active", active)
        if mask.dtype != np.bool_ or mask.shape != (batch,):
            raise InvalidShapeError(
                f"active: found {mask.dtype} {mask.shape}, wanted bool of shape ({batch},)"
            )
        if here:
            return ids, mask
        used = ids[mask]
        vocab = self.config.vocab_size
        if used.size and (used.min() < 0 or used.max() >= vocab):
            bad = int(used[(used < 0) | (used >= vocab)][0])
            raise InvalidShapeError(f"token_ids: found id {bad}, wanted 0 to {vocab - 1}")
        return ids.astype(np.int32), mask

    def _check_k(self, k: int) -> None:
        if not 1 <= k <= self.config.vocab_size:
            raise InvalidShapeError(f"k: found {k}, wanted 1 to {self.config.vocab_size}")

    def _target(self, out: Any, shape: tuple[int, ...], form: str = "batch") -> Any:
        """``out``, checked, as an array that logits are written to; None for None."""
        if out is None:
            return None
        if form == "list":
            raise InvalidShapeError("out: found with a ragged list, wanted None")
        to = self._engine.adopt("out", out)
        if to is None or to.dtype != np.float32 or to.shape != shape:
            found = type(out).__name__ if to is None else f"{to.dtype} {to.shape}"
            raise InvalidShapeError(f"out: found {found}, wanted float32 {shape}")
        if not (to.flags.c_contiguous and getattr(to.flags, "writeable", True)):
            raise InvalidShapeError("out: found a strided or read-only array, wanted contiguous")
        return to
