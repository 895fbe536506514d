"""Models of the same shape in bfloat16: decode of torch as one CUDA graph, and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from harness import Turn
from torch_peer import Torch

import bitnet_ext as bx


class GraphedDecoder:
    """A decode step in torch with a static cache, for one graph; random weights.

    The norms inside attention and FFN that BitNet has are left out, in this peer's favour.
    """

    def __init__(self, torch: Torch, config: bx.BitNetConfig, batch: int, context: int) -> None:
        self._torch, self._config = torch.torch, config
        c = config
        heads = c.q_size + 2 * c.kv_size
        shapes = [(heads, c.hidden_size), (c.hidden_size, c.q_size)]
        shapes += [(2 * c.intermediate_size, c.hidden_size), (c.hidden_size, c.intermediate_size)]
        scale = c.hidden_size**-0.5
        self._layers = [[torch.randn(*s) * scale for s in shapes] for _ in range(c.num_layers)]
        self._table = torch.randn(c.vocab_size, c.hidden_size)
        self._norm = torch.torch.ones(c.hidden_size, device=torch.place, dtype=self._table.dtype)
        room = (batch, c.num_kv_heads, context + 1, c.head_dim)
        self._cache = [[torch.randn(*room) for _ in range(2)] for _ in range(c.num_layers)]
        self._ids = torch.tensor(np.zeros(batch, np.int64))
        self._position = torch.tensor(np.array([context]))
        self._keys = torch.tensor(np.arange(context + 1))
        angle = torch.tensor(np.full((1, c.head_dim // 2), 0.1, np.float32))
        self._cos, self._sin = (a.to(self._table.dtype) for a in (angle.cos(), angle.sin()))

    def step(self) -> Any:
        """Logits [B, V] of one token more, always at the same position."""
        functional, c = self._torch.nn.functional, self._config
        x = self._table[self._ids]
        seen = (self._keys <= self._position)[None, None, None]
        for (qkv, o, gate_up, down), (keys, values) in zip(self._layers, self._cache, strict=True):
            rows = functional.linear(self._normed(x), qkv).view(len(x), -1, 1, c.head_dim)
            q, k, v = rows.split([c.num_heads, c.num_kv_heads, c.num_kv_heads], 1)
            keys.index_copy_(2, self._position, self._turned(k))
            values.index_copy_(2, self._position, v)
            attended = functional.scaled_dot_product_attention(
                self._turned(q), keys, values, attn_mask=seen, enable_gqa=True
            )
            x = x + functional.linear(attended.reshape(len(x), -1), o)
            gate, up = functional.linear(self._normed(x), gate_up).chunk(2, -1)
            x = x + functional.linear(functional.relu(gate).square() * up, down)
        return functional.linear(self._normed(x), self._table)

    def _normed(self, x: Any) -> Any:
        return self._torch.nn.functional.rms_norm(x, (x.shape[-1],), self._norm, 1e-5)

    def _turned(self, x: Any) -> Any:
        a, b = x.chunk(2, -1)
        return self._torch.cat((a * self._cos - b * self._sin, b * self._cos + a * self._sin), -1)


class Transformers:
    """BitNet of the transformers package with plain bfloat16 weights, run eagerly."""

    def __init__(self, torch: Torch, config: bx.BitNetConfig) -> None:
        import transformers

        self._torch = torch
        self._cache_of = transformers.DynamicCache
        c = config
        shape = transformers.BitNetConfig(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_hidden_layers=c.num_layers,
            num_attention_heads=c.num_heads,
            num_key_value_heads=c.num_kv_heads,
            max_position_embeddings=c.max_position_embeddings,
            tie_word_embeddings=True,
        )
        with torch.torch.device(torch.place):
            self._model = transformers.AutoModelForCausalLM.from_config(
                shape, dtype=torch.torch.bfloat16
            ).eval()

    def prefill(self, length: int) -> Callable[[], object]:
        ids = self._torch.tensor(np.zeros((1, length), np.int64))
        return lambda: self._model(ids, use_cache=True, logits_to_keep=1)

    def decode(self, batch: int, context: int, steps: int) -> Turn:
        """Steps of one token after a context."""
        cache = self._cache_of()
        ids = self._torch.tensor(np.zeros((batch, context), np.int64))
        self._model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = ids[:, :1]

        def work() -> None:
            for _ in range(steps):
                self._model(token, past_key_values=cache, use_cache=True)
            cache.crop(-steps)

        return Turn(work, steps)
