"""A transformer layer made of single ops: what ``_core.Layer`` has to equal, bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.model.layers import NO_NORM, Layer, Linear, Norm


class LayerByOps:
    """Runs like ``_core.Layer``; ``seen`` collects the int8 input of every linear layer."""

    def __init__(self, weights: Layer, config: BitNetConfig, seen: list[np.ndarray]) -> None:
        self.weights, self.config, self.seen = weights, config, seen

    def forward(
        self,
        hidden: np.ndarray,
        buffers: Any,
        cache: _core.KVCache,
        layer: int,
        cos: np.ndarray | None,
        sin: np.ndarray | None,
        seq: np.ndarray,
        pos: np.ndarray,
        starts: np.ndarray,
        first_pos: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> None:
        w, c = self.weights, self.config
        qkv = self.group(w.qkv, hidden, w.attn_norm)
        _core.rope_append(qkv, cos, sin, cache, layer, seq, pos)
        attention = np.empty((len(hidden), c.q_size), np.float32)
        _core.attend(qkv, cache, layer, starts, first_pos, c.head_dim**-0.5, attention)
        self.linear(w.o, attention, w.o.norm, hidden, residual=True)
        ffn = self.group(w.gate_up, hidden, w.ffn_norm)
        q = np.empty((len(hidden), w.down.weight.shape[1]), np.int8)
        s = np.empty(len(hidden), np.float32)
        norm = w.down.norm
        _core.act_quant(
            ffn, c.hidden_act, c.gated_ffn, norm.weight, norm.bias, norm.kind, norm.eps, q, s
        )
        self.seen.append(q)
        _core.ternary_linear(q, s, w.down.weight, w.down.bias, True, hidden)
        if kept is not None:
            ends = [np.arange(end - n, end) for end, n in zip(starts[1:], kept, strict=True)]
            wanted = hidden[np.concatenate(ends)]
            hidden[: len(wanted)] = wanted

    def linear(
        self, linear: Linear, x: np.ndarray, norm: Norm, out: np.ndarray, residual: bool = False
    ) -> None:
        q, s = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
        _core.norm_quant(x, norm.weight, norm.bias, norm.eps, norm.kind, q, s)
        self.seen.append(q)
        _core.ternary_linear(q, s, linear.weight, linear.bias, residual, out)

    def group(self, parts: tuple[Linear, ...], x: np.ndarray, norm: Norm) -> np.ndarray:
        outs = [np.empty((len(x), part.weight.shape[0]), np.float32) for part in parts]
        if any(part.norm is not NO_NORM for part in parts) and norm is not NO_NORM:
            normed = np.empty_like(x)
            _core.norm(x, norm.weight, norm.bias, norm.eps, norm.kind, normed)
            x, norm = normed, NO_NORM
        for part, out in zip(parts, outs, strict=True):
            self.linear(part, x, norm if part.norm is NO_NORM else part.norm, out)
        return np.concatenate(outs, axis=1)
