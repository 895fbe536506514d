"""Runs packed rows through the layers: what every path of the transformer shares.

Every kernel gives a row the same bits whatever the block it stands in, so blocks may be cut
anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.gpu.device import device_of
from bitnet_ext.gpu.interchange import host_array
from bitnet_ext.memory.estimate import kv_bytes_per_token
from bitnet_ext.memory.kv_cache import KVCache, KvDtype
from bitnet_ext.memory.workspace import (
    FULL_BLOCK_ROWS,
    PREFILL_BLOCK_ROWS,
    Workspace,
    WorkspacePool,
    block_rows,
    empty_array,
)
from bitnet_ext.model.batch import Rows, TokenBatch
from bitnet_ext.model.head import Head
from bitnet_ext.model.load import Weights
from bitnet_ext.model.rope import RopeTables

__all__ = ["Engine", "Largest"]

Float32 = npt.NDArray[np.float32]
Int32 = npt.NDArray[np.int32]
_PAGE_TOKENS = 64
_SCORE_ROWS = 32  # rows of logits that logprobs holds at a time


@dataclass(frozen=True)
class Largest:
    """Which logits a caller wants: the ``k`` largest of each row, and ``keep[b]`` whatever they
    are."""

    k: int
    keep: Sequence[Int32]


class Engine:
    """Weights and intermediates of one model on the CPU."""

    device = "cpu"

    def __init__(self, config: BitNetConfig, weights: Weights, kv_dtype: KvDtype) -> None:
        self.config = config
        self.weights = weights
        self.kv_dtype: KvDtype = kv_dtype
        self.rope = RopeTables(config) if config.position == "rope" else None
        self.pool = WorkspacePool(config)
        self.head = Head(weights.head, weights.head_bias)
        self.layers = [
            _core.Layer(layer, config.hidden_act, config.gated_ffn, config.head_dim**-0.5)
            for layer in weights.layers
        ]

    # --- what Transformer asks for ---------------------------------------------------------

    def new_cache(self, batch_size: int, max_seq_len: int) -> KVCache:
        """An empty cache."""
        return KVCache(self.config, batch_size, max_seq_len, self.kv_dtype)

    def empty(self, shape: tuple[int, ...]) -> Float32:
        """An array for logits."""
        return empty_array(shape)

    def adopt(self, name: str, array: Any) -> Any:
        """An array of the host as NumPy's; None for what is none."""
        here = hasattr(array, "__dlpack__") and device_of(array) is None
        return host_array(name, array) if here else None

    def full(
        self, batch: TokenBatch, kept: Int32, shape: tuple[int, ...], out: Float32 | None
    ) -> Float32:
        """Logits of the last ``kept`` positions of each sequence: packed, or in a batch's shape."""
        output_bytes = 0 if out is not None else 4 * int(np.prod(shape))
        hidden = self.hidden_rows(batch, kept, output_bytes)
        self.final_norm(hidden)
        result = out if out is not None else empty_array(shape)
        rows = result.reshape(-1, shape[-1])
        if batch.form == "batch":
            used = (np.arange(shape[1]) < kept[:, None]).ravel()
            self.head.project(hidden, rows, np.flatnonzero(used).astype(np.int32))
            rows[~used] = 0
        else:
            self.head.project(hidden, rows)
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
        vocab = self.config.vocab_size
        hidden = self.hidden_rows(batch, kept, 4 * _SCORE_ROWS * vocab)
        self.final_norm(hidden)
        logits = empty_array((min(_SCORE_ROWS, len(targets)), vocab))
        for low in range(0, len(targets), _SCORE_ROWS):
            part = slice(low, min(low + _SCORE_ROWS, len(targets)))
            block = logits[: part.stop - low]
            self.head.project(hidden[part], block)
            logprobs[part], greedy[part] = _core.log_softmax_gather(block, targets[part])

    def prefill(
        self,
        batch: TokenBatch,
        cache: KVCache,
        chunk_size: int | None,
        shape: tuple[int, ...],
        out: Float32 | None,
    ) -> Float32:
        """Append the tokens; logits of each sequence's last one, NaN where it has none."""
        last = self.prefill_rows(batch, cache, chunk_size)
        self.final_norm(last)
        result = out if out is not None else empty_array(shape)
        rows = result.reshape(-1, shape[-1])
        rows[batch.counts == 0] = np.nan
        self.head.project(last, rows, np.flatnonzero(batch.counts).astype(np.int32))
        return result

    def decode(
        self,
        ids: Int32,
        mask: npt.NDArray[np.bool_],
        cache: KVCache,
        shape: tuple[int, ...],
        out: Float32 | None,
        largest: Largest | None,
    ) -> Float32:
        """Append one token to each sequence that ``mask`` marks; logits of the next."""
        with self.pool.lease(len(mask)) as workspace:
            result = out
            if result is None:
                result = empty_array(shape)
                result[~mask] = np.nan
            self._step(workspace, ids, mask, cache, result, largest)
        return result

    def decode_topk(
        self, ids: Int32, mask: npt.NDArray[np.bool_], cache: KVCache, k: int
    ) -> tuple[Int32, Float32]:
        """Append one token to each sequence; the k largest logits of the next, lowest id on ties.

        The logits between stand in the workspace: fresh ones would be mapped and zeroed each step.
        """
        with self.pool.lease(len(mask)) as workspace:
            logits = workspace.logits(len(mask))
            keep = [np.empty(0, np.int32)] * len(mask)
            self._step(workspace, ids, mask, cache, logits, Largest(k, keep))
            found, values = _core.topk(logits, k)
        return found, values

    # --- the parts -------------------------------------------------------------------------

    def hidden_rows(self, batch: TokenBatch, kept: Int32, output_bytes: int) -> Float32:
        """The residual stream after the last layer, float32 [rows, E], of the last ``kept`` tokens
        of each sequence: layer by layer, so that only one layer's K and V are held."""
        config = self.config
        total = len(batch.ids)
        past = np.zeros(len(batch.counts), np.int32)
        pages = -(-batch.counts.astype(np.int64) // _PAGE_TOKENS)
        kv = int(pages.sum()) * _PAGE_TOKENS * kv_bytes_per_token(config, self.kv_dtype)
        others = kv + 4 * total * config.hidden_size + output_bytes
        limit = self._block_limit(min(total, FULL_BLOCK_ROWS), others)
        with self.pool.lease(limit) as workspace:
            hidden = empty_array((total, config.hidden_size))
            blocks = list(batch.rows(past, limit, kept))
            for low, rows in blocks:
                self._embed(rows, hidden[low : low + len(rows)])
            cache = _core.KVCache(
                1,
                len(batch.counts),
                config.num_kv_heads,
                config.head_dim,
                config.head_dim,
                batch.width,
                self.kv_dtype,
            )
            cache.reserve(batch.counts)
            cos, sin = self._angles(batch.width)
            done = 0
            for i, layer in enumerate(self.layers):
                for low, r in blocks:
                    part, where = hidden[low : low + len(r)], (r.seq, r.pos, r.starts, r.first_pos)
                    wanted = r.kept if i == len(self.layers) - 1 else None
                    layer.forward(part, workspace.buffers, cache, 0, cos, sin, *where, wanted)
                    if wanted is not None:
                        count = int(wanted.sum())
                        hidden[done : done + count] = part[:count]
                        done += count
        return hidden[: int(kept.sum())]

    def prefill_rows(self, batch: TokenBatch, cache: KVCache, chunk_size: int | None) -> Float32:
        """Run all new tokens; the residual rows of each sequence's last one, [active, E]."""
        active = np.flatnonzero(batch.counts)
        wanted = min(len(batch.ids), PREFILL_BLOCK_ROWS)
        limit = self._block_limit(wanted, 4 * len(active) * self.config.hidden_size)
        limit = min(limit, chunk_size or limit)
        with self.pool.lease(limit) as workspace:
            last = empty_array((len(active), self.config.hidden_size))
            done = 0
            for _, rows in batch.rows(cache.length, limit, np.minimum(batch.counts, 1)):
                hidden = self.run_block(workspace, rows, cache)
                last[done : done + len(hidden)] = hidden
                done += len(hidden)
        return last

    def _step(
        self,
        workspace: Workspace,
        ids: Int32,
        mask: npt.NDArray[np.bool_],
        cache: KVCache,
        out: Float32,
        largest: Largest | None,
    ) -> None:
        """One token of each sequence that ``mask`` marks; its row of ``out`` takes the logits."""
        rows = Rows.one_each(ids, mask, mask.astype(np.int32), cache.length)
        hidden = self.run_block(workspace, rows, cache)
        self.final_norm(hidden)
        if largest is None:
            self.head.project(hidden, out, rows.seq)
        else:
            keep = [largest.keep[i] for i in rows.seq.tolist()]
            self.head.project_top(hidden, out, largest.k, keep, rows.seq)

    def run_block(self, workspace: Workspace, rows: Rows, cache: KVCache) -> Float32:
        """All layers over one block of rows; the residual stream of those that are kept, in the
        workspace."""
        hidden = workspace.hidden(len(rows))
        self._embed(rows, hidden)
        cos, sin = self._angles(int(rows.pos.max(initial=0)) + 1)
        where = (rows.seq, rows.pos, rows.starts, rows.first_pos)
        store = cache._core
        assert isinstance(store, _core.KVCache)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            kept = rows.kept if i == last else None
            layer.forward(hidden, workspace.buffers, store, i, cos, sin, *where, kept)
        return hidden if rows.kept is None else hidden[: int(rows.kept.sum())]

    def _angles(self, positions: int) -> tuple[Float32, Float32] | tuple[None, None]:
        return self.rope.upto(positions) if self.rope else (None, None)

    def _embed(self, rows: Rows, hidden: Float32) -> None:
        table = self.weights.embedding
        _core.embed(table.data, table.dtype, rows.ids, hidden)
        if self.weights.positions is not None:
            _core.add_rows(hidden, self.weights.positions, rows.pos)

    def _block_limit(self, rows: int, other_bytes: int) -> int:
        while True:
            try:
                return block_rows(self.config, rows, other_bytes, self.pool.held_bytes)
            except MemoryError:
                if not (self.pool.release_logits() or self.head.release_screen()):
                    raise

    def final_norm(self, hidden: Float32) -> None:
        norm = self.weights.final_norm
        _core.norm(hidden, norm.weight, norm.bias, norm.eps, norm.kind, hidden)
