"""Runs packed rows through the layers: what every path of the transformer shares.

Every kernel gives a row the same bits whatever the block it stands in, so blocks may be cut
anywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.memory.estimate import kv_bytes_per_token
from bitnet_ext.memory.kv_cache import KVCache, KvDtype
from bitnet_ext.memory.workspace import Workspace, WorkspacePool, block_rows, empty_array
from bitnet_ext.model.batch import Rows, TokenBatch
from bitnet_ext.model.head import Head
from bitnet_ext.model.load import Weights
from bitnet_ext.model.rope import RopeTables

__all__ = ["Engine", "Project"]

Float32 = npt.NDArray[np.float32]
Project = Callable[[Float32, Float32], None]  # rows of hidden states [M, E] into logits [M, V]
_PAGE_TOKENS = 64


class Engine:
    """Weights and intermediates of one model on the CPU."""

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

    def hidden_rows(self, batch: TokenBatch, output_bytes: int) -> Float32:
        """The residual stream after the last layer, float32 [rows, E]: layer by layer, so that
        only one layer's K and V are held."""
        config = self.config
        total = len(batch.ids)
        past = np.zeros(len(batch.counts), np.int32)
        pages = -(-batch.counts.astype(np.int64) // _PAGE_TOKENS)
        kv = int(pages.sum()) * _PAGE_TOKENS * kv_bytes_per_token(config, self.kv_dtype)
        limit = self._block_limit(total, kv + 4 * total * config.hidden_size + output_bytes)
        with self.pool.lease(limit) as workspace:
            hidden = empty_array((total, config.hidden_size))
            blocks = list(batch.rows(past, limit))
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
            for layer in self.layers:
                for low, r in blocks:
                    part, where = hidden[low : low + len(r)], (r.seq, r.pos, r.starts, r.first_pos)
                    layer.forward(part, workspace.buffers, cache, 0, cos, sin, *where)
        return hidden

    def prefill_rows(self, batch: TokenBatch, cache: KVCache, chunk_size: int | None) -> Float32:
        """Run all new tokens; the residual rows of each sequence's last one, [active, E]."""
        active = np.flatnonzero(batch.counts)
        limit = self._block_limit(len(batch.ids), 4 * len(active) * self.config.hidden_size)
        limit = min(limit, chunk_size or limit)
        ends = np.cumsum(batch.counts, dtype=np.int64)[active] - 1
        with self.pool.lease(limit) as workspace:
            last = empty_array((len(active), self.config.hidden_size))
            for low, rows in batch.rows(cache.length, limit):
                hidden = self.run_block(workspace, rows, cache)
                done = np.flatnonzero((ends >= low) & (ends < low + len(rows)))
                last[done] = hidden[ends[done] - low]
        return last

    def run_block(self, workspace: Workspace, rows: Rows, cache: KVCache) -> Float32:
        """All layers over one block of rows; the residual stream, in the workspace."""
        hidden = workspace.hidden(len(rows))
        self._embed(rows, hidden)
        cos, sin = self._angles(int(rows.pos.max(initial=0)) + 1)
        where = (rows.seq, rows.pos, rows.starts, rows.first_pos)
        for i, layer in enumerate(self.layers):
            layer.forward(hidden, workspace.buffers, cache._core, i, cos, sin, *where)
        return hidden

    def _angles(self, positions: int) -> tuple[Float32, Float32] | tuple[None, None]:
        return self.rope.upto(positions) if self.rope else (None, None)

    def _embed(self, rows: Rows, hidden: Float32) -> None:
        table = self.weights.embedding
        _core.embed(table.data, table.dtype, rows.ids, hidden)
        if self.weights.positions is not None:
            _core.add_rows(hidden, self.weights.positions, rows.pos)

    def _block_limit(self, rows: int, other_bytes: int) -> int:
        try:
            return block_rows(self.config, rows, other_bytes, self.pool.held_bytes)
        except MemoryError:
            if not self.head.release_screen():
                raise
            return block_rows(self.config, rows, other_bytes, self.pool.held_bytes)

    def final_norm(self, hidden: Float32) -> None:
        norm = self.weights.final_norm
        _core.norm(hidden, norm.weight, norm.bias, norm.eps, norm.kind, hidden)

    def project_ragged(self, hidden: Float32, counts: npt.NDArray[np.int32], out: Float32) -> None:
        begin = 0
        for row, count in zip(out, counts.tolist(), strict=True):
            if count:
                self.head.project(hidden[begin : begin + count], row[:count])
            row[count:] = 0
            begin += count

    def project_active(self, hidden: Float32, mask: npt.NDArray[np.bool_], out: Float32) -> None:
        if mask.all():
            self.head.project(hidden, out)
            return
        out[~mask] = np.nan
        self.scatter(hidden, mask, out, self.head.project)

    def scatter(
        self, hidden: Float32, mask: npt.NDArray[np.bool_], out: Float32, project: Project
    ) -> None:
        """``project`` the rows of ``hidden`` into the rows of ``out`` that ``mask`` marks."""
        if not mask.any():
            return
        packed = empty_array((len(hidden), self.config.vocab_size))
        project(hidden, packed)
        out[mask] = packed
