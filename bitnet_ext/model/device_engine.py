"""Runs rows through the layers on a CUDA device: the counterpart of engine.py.

The kernels give a row the same bits whatever the block it stands in, and but for attention in half
precision the CPU's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import device as devices
from bitnet_ext.gpu.attend import Precision
from bitnet_ext.gpu.embed import embed
from bitnet_ext.gpu.kv_append import advance
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows
from bitnet_ext.gpu.logprob import gather_logprobs
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.gpu.topk import MOST_LARGEST, TopK
from bitnet_ext.memory.device_store import DeviceStore
from bitnet_ext.memory.estimate_device import DEVICE_BLOCK_ROWS
from bitnet_ext.memory.kv_cache import KVCache, KvDtype
from bitnet_ext.model.batch import Rows, TokenBatch
from bitnet_ext.model.device_head import DeviceHead
from bitnet_ext.model.device_layers import Angles, DeviceLayer, DeviceNorm, Intermediates
from bitnet_ext.model.engine import Largest
from bitnet_ext.model.load import Table, Weights
from bitnet_ext.model.rope import RopeTables

__all__ = ["DecodeStep", "DeviceEngine"]

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]

_SCORE_ROWS = 256  # rows of logits that logprobs holds at a time


class DeviceEngine:
    """Weights of one model on the current CUDA device; of matrices and tables the host keeps none.

    Raises:
        DeviceUnavailableError: there is none.
    """

    device = "cuda"

    def __init__(
        self,
        config: BitNetConfig,
        weights: Weights,
        kv_dtype: KvDtype,
        precision: Precision = "f32",
    ) -> None:
        self.config = config
        self.kv_dtype: KvDtype = kv_dtype
        self.gpu = gpu = devices.cuda_device()
        self.layers = [DeviceLayer(gpu, config, layer, precision) for layer in weights.layers]
        self._embedding = _upload(gpu, weights.embedding)
        tied = weights.head is weights.embedding
        self._head_table = self._embedding if tied else _upload(gpu, weights.head)
        self._bias = None if weights.head_bias is None else gpu.to_device(weights.head_bias)
        self.head = DeviceHead(gpu, self._head_table, self._bias)
        self._positions = None if weights.positions is None else gpu.to_device(weights.positions)
        self.final_norm = DeviceNorm.upload(gpu, weights.final_norm)
        self._rope = RopeTables(config) if config.position == "rope" else None
        self._angles: Angles = (None, None)

    @property
    def weights(self) -> Weights:
        """All of them on the host again, for a file."""
        embedding = _download(self.gpu, self._embedding)
        tied = self._head_table is self._embedding
        bias, positions = self._bias, self._positions
        return Weights(
            layers=tuple(layer.host() for layer in self.layers),
            embedding=embedding,
            head=embedding if tied else _download(self.gpu, self._head_table),
            head_bias=None if bias is None else self.gpu.to_host(bias),
            positions=None if positions is None else self.gpu.to_host(positions),
            final_norm=self.final_norm.norm,
        )

    # --- what Transformer asks for ---------------------------------------------------------

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache on the device."""
        return KVCache(self.config, batch_size, max_seq_len, self.kv_dtype, self.gpu)

    def empty(self, shape: tuple[int, ...]) -> Any:
        """An array for logits."""
        return self.gpu.empty(shape, np.float32)

    def adopt(self, name: str, array: Any) -> Any:
        """An array on this device as one of the kind that logits are; None for any other."""
        if self.gpu.owns(array):
            return array
        return self.gpu.adopt(array) if devices.device_of(array) is self.gpu else None

    def full(self, batch: TokenBatch, kept: Int32, shape: tuple[int, ...], out: Any) -> Any:
        """Logits of the last ``kept`` positions of each sequence: packed, or in a batch's shape."""
        hidden = self._final_rows(self._hidden_rows(batch), batch, kept)
        result = out if out is not None else self.empty(shape)
        if batch.form != "batch" or bool(np.all(kept == shape[1])):
            self.project(hidden, result.reshape(-1, shape[-1]))
            return result
        begin = 0
        for row, count in zip(result, kept.tolist(), strict=True):
            self.project(hidden[begin : begin + count], row[:count])
            row[count:] = 0
            begin += count
        return result

    def logprobs(
        self,
        batch: TokenBatch,
        kept: Int32,
        targets: Int32,
        logprobs: Float32,
        greedy: npt.NDArray[np.bool_],
    ) -> None:
        """Log-softmax at the targets, _SCORE_ROWS rows of logits at a time."""
        hidden = self._final_rows(self._hidden_rows(batch), batch, kept)
        gpu, count = self.gpu, len(targets)
        logits = self.empty((min(_SCORE_ROWS, count), self.config.vocab_size))
        wanted, found = gpu.to_device(targets), self.empty((count,))
        largest = gpu.empty((count,), np.bool_)
        for low in range(0, count, _SCORE_ROWS):
            part = slice(low, min(low + _SCORE_ROWS, count))
            block = logits[: part.stop - low]
            self.project(hidden[part], block)
            gather_logprobs(gpu, block, wanted[part], found[part], largest[part])
        logprobs[:] = gpu.to_host(found)
        greedy[:] = gpu.to_host(largest)

    def prefill(
        self,
        batch: TokenBatch,
        cache: KVCache,
        chunk_size: int | None,
        shape: tuple[int, ...],
        out: Any,
    ) -> Any:
        """Append the tokens; logits of each sequence's last one, NaN where it has none."""
        store = _store(cache)
        ends = np.cumsum(batch.counts, dtype=np.int64)
        last = self.empty((len(ends), self.config.hidden_size))
        angles = self.angles(int((store.lengths + batch.counts).max(initial=1)))
        x, limit = self._room(min(len(batch.ids), chunk_size or DEVICE_BLOCK_ROWS))
        for low, rows in batch.rows(store.lengths, limit):
            x.resize(len(rows))
            places = DeviceRows.ragged(self.gpu, np.diff(rows.starts))
            self._embed_rows(rows, x.hidden)
            for i, layer in enumerate(self.layers):
                layer.run(x, store.cache, i, places, angles)
            advance(store.cache, places)
            done = np.flatnonzero((batch.counts > 0) & (ends > low) & (ends <= low + len(rows)))
            if len(done):  # sequences without tokens may lie between: any row does for them
                part = slice(done[0], done[-1] + 1)
                self._take(x.hidden, ends[part] - 1 - low, last[part])
        self.final_norm.rows(last, last)
        result = out if out is not None else self.empty(shape)
        active = None
        if not batch.counts.all():
            result[...] = np.nan
            active = self.gpu.to_device(batch.counts > 0)
        self.project(last, result.reshape(-1, shape[-1]), active)
        return result

    def decode(
        self,
        ids: Any,
        mask: npt.NDArray[np.bool_],
        cache: KVCache,
        shape: tuple[int, ...],
        out: Any,
        largest: Largest | None,
    ) -> Any:
        """Append one token to each sequence that ``mask`` marks; logits of the next."""
        top = None if largest is None else self.head.top(len(mask), largest.k)
        seen = None if largest is None else self.head.marks(largest.keep)
        step = self.step(cache)
        step.put_ids(ids)
        step.put_active(mask)
        step.run()
        result = out if out is not None else self.empty(shape)
        if out is None and not mask.all():
            result[...] = np.nan
        if top is None:
            self.project(step.hidden, result, step.active)
        else:
            top.project(step.hidden, result, step.active, seen)
        return result

    def decode_topk(
        self, ids: Any, mask: npt.NDArray[np.bool_], cache: KVCache, k: int
    ) -> tuple[Any, Any]:
        """Append one token to each sequence; the k largest logits of the next, lowest id on ties,
        on the device.

        Raises:
            InvalidShapeError: ``k`` above 4096 and below V.
        """
        if k > MOST_LARGEST:
            raise InvalidShapeError(f"k: found {k}, wanted at most {MOST_LARGEST} on a device")
        shape = len(mask), self.config.vocab_size
        keep = [np.empty(0, np.int32)] * len(mask)
        logits = self.decode(ids, mask, cache, shape, None, Largest(k, keep))
        finder = TopK(self.gpu, len(logits), logits.shape[1], k)
        finder.find(logits)
        return finder.ids, finder.values

    def step(self, cache: KVCache) -> DecodeStep:
        """The decode step of ``cache``, made on first use."""
        steps = _store(cache).steps
        if self not in steps:
            steps[self] = DecodeStep(self, cache)
        found: DecodeStep = steps[self]
        return found

    # --- the parts -------------------------------------------------------------------------

    def project(self, hidden: Any, out: Any, active: Any = None) -> None:
        """Logits of normed rows; rows of ``out`` that are not ``active`` are left alone."""
        self.head.project(hidden, out, active)

    def angles(self, positions: int) -> Angles:
        """cos and sin on the device, of at least so many positions."""
        held = self._angles[0]
        if self._rope is not None and (held is None or len(held) < positions):
            cos, sin = self._rope.upto(positions)
            self._angles = self.gpu.to_device(cos), self.gpu.to_device(sin)
        return self._angles

    def embed(self, ids: Any, out: Any, positions: Any) -> None:
        """Rows of the embedding table, and of the positions' where the model has one."""
        embed(self.gpu, self._embedding, ids, out, self._positions, positions)

    def _embed_rows(self, rows: Rows, out: Any) -> None:
        self.embed(self.gpu.to_device(rows.ids), out, self.gpu.to_device(rows.pos))

    def _room(self, rows: int) -> tuple[Intermediates, int]:
        """Room for what layers write of a block of at most so many rows, and of how many: what
        fits the device's memory."""
        limit = min(DEVICE_BLOCK_ROWS, rows)
        while True:
            try:
                return Intermediates(self.gpu, self.config, limit), limit
            except MemoryError:
                if self.head.release_screen():
                    continue
                if limit == 1:
                    raise
                limit = -(-limit // 2)

    def _hidden_rows(self, batch: TokenBatch) -> Any:
        """The residual stream after the last layer, [rows, E]: layer by layer, so that only one
        layer's K and V are held."""
        c = self.config
        hidden = self.empty((len(batch.ids), c.hidden_size))
        cache = DeviceCache(
            *(self.gpu, 1, len(batch.counts), c.num_kv_heads, c.head_dim, c.head_dim, batch.width),
            self.kv_dtype,
        )
        past = np.zeros(len(batch.counts), np.int32)
        angles = self.angles(batch.width)
        x, limit = self._room(len(batch.ids))
        for i, layer in enumerate(self.layers):
            for low, rows in batch.rows(past, limit):
                x.resize(len(rows))
                x.hidden = hidden[low : low + len(rows)]
                if i == 0:
                    self._embed_rows(rows, x.hidden)
                places = DeviceRows.ragged(self.gpu, np.diff(rows.starts))
                layer.run(x, cache, 0, places, angles)
                advance(cache, places)
            cache.reset()
        return hidden

    def _final_rows(self, hidden: Any, batch: TokenBatch, kept: Int32) -> Any:
        """The last ``kept`` rows of each sequence, packed and normed."""
        if bool(np.all(batch.counts == kept)):
            self.final_norm.rows(hidden, hidden)
            return hidden
        ends = np.cumsum(batch.counts)
        index = [np.arange(end - keep, end) for end, keep in zip(ends, kept, strict=True)]
        rows = self.empty((int(kept.sum()), self.config.hidden_size))
        self._take(hidden, np.concatenate(index), rows)
        self.final_norm.rows(rows, rows)
        return rows

    def _take(self, rows: Any, index: npt.NDArray[np.integer[Any]], out: Any) -> None:
        """``out[m] = rows[index[m]]``"""
        table = DeviceTable(rows, "f32", rows.shape[1], None)
        embed(self.gpu, table, self.gpu.to_device(index.astype(np.int32)), out)


class DecodeStep:
    """One more token for every active sequence of a cache: the first run launches kernel by kernel,
    the second captures them, and later ones replay the graph.

    Everything that changes from step to step is in device memory.

    Args:
        then: more work of each step, captured with it.

    Attributes:
        ids: int32 [B], the tokens to append.
        active: bool [B].
        hidden: float32 [B, E], what the projection on the vocabulary reads.
    """

    def __init__(
        self, engine: DeviceEngine, cache: KVCache, then: Callable[[DecodeStep], None] | None = None
    ) -> None:
        gpu, batch = engine.gpu, cache.batch_size
        self._engine = engine
        self._then = then
        self._mask = np.ones(batch, np.bool_)
        self.cache = _store(cache).cache
        self.ids = gpu.to_device(np.zeros(batch, np.int32))
        self.active = gpu.to_device(self._mask)
        self.hidden = engine.empty((batch, engine.config.hidden_size))
        self._rows = DeviceRows.one_each(batch, self.active)
        self._room = Intermediates(gpu, engine.config, batch, cache=self.cache)
        self._angles = engine.angles(cache.max_seq_len)
        self._runs = 0
        self._replay: Callable[[], None] = self._work

    def put_active(self, mask: npt.NDArray[np.bool_]) -> None:
        """Say which sequences take part; copied to the device where it changed."""
        if not np.array_equal(mask, self._mask):
            self._mask = mask.copy()
            self._engine.gpu.write(self.active, self._mask)

    def put_ids(self, ids: Any) -> None:
        """The tokens to append, int32 [B] of the host or the device."""
        if not self._engine.gpu.owns(ids):
            self._engine.gpu.write(self.ids, ids)
        elif ids is not self.ids:
            self.ids[...] = ids

    def run(self) -> None:
        """Append, and fill ``hidden``; the host's lengths are the caller's to advance."""
        if self._runs == 1:
            self._replay = self._engine.gpu.capture(self._work)
        self._runs += 1
        self._replay()

    def _work(self) -> None:
        engine, x = self._engine, self._room
        engine.embed(self.ids, x.hidden, self.cache.lengths)
        for i, layer in enumerate(engine.layers):
            layer.run(x, self.cache, i, self._rows, self._angles)
        engine.final_norm.rows(x.hidden, self.hidden)
        advance(self.cache, self._rows)
        if self._then is not None:
            self._then(self)


def _upload(gpu: devices.Device, table: Table) -> DeviceTable:
    return DeviceTable.upload(gpu, table.data, table.dtype, table.scales)


def _download(gpu: devices.Device, table: DeviceTable) -> Table:
    scales = None if table.scales is None else gpu.to_host(table.scales)
    return Table(table.download(gpu), table.dtype, scales)


def _store(cache: KVCache) -> DeviceStore:
    store = cache._core
    assert isinstance(store, DeviceStore)
    return store
