"""litespark-inference (PyPI) on the very weights of a bitnet_ext model."""

from __future__ import annotations

from typing import Any

import numpy as np
from litespark_inference.torchless import kernel, runtime
from litespark_inference.torchless.model import (
    BitNetConfig,
    PackedBitNetModel,
    PackedLayer,
    PackedProjection,
)
from litespark_inference.torchless.pack import pack_ternary_4_per_byte

import bitnet_ext as bx

NAME = "litespark-inference"
PART = 64  # tokens: of more at a time 1.0.3 gives wrong logits with AVX-512


def _projection(rows: np.ndarray, scale: float) -> PackedProjection:
    n, k = rows.shape
    return PackedProjection(
        w_packed=pack_ternary_4_per_byte(np.ascontiguousarray(rows)),
        w_sum=rows.sum(1, dtype=np.int32),
        scale=scale,
        in_features=k,
        out_features=n,
    )


def _split(weight: Any, sizes: list[int]) -> list[PackedProjection]:
    """The projections that bitnet_ext holds side by side."""
    matrix, ends = weight.unpack(), np.cumsum(sizes)
    scales = np.broadcast_to(np.asarray(weight.scale, np.float32), (len(matrix),))
    return [
        _projection(matrix[end - size : end], float(scales[end - size]))
        for size, end in zip(sizes, ends, strict=True)
    ]


def _int8_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Its int8 head: each row over its largest magnitude."""
    quantised = np.empty(table.shape, np.int8)
    scales = np.empty(len(table), np.float32)
    for low in range(0, len(table), 4096):
        rows = (table[low : low + 4096].astype(np.uint32) << 16).view(np.float32)
        scales[low : low + 4096] = scale = np.maximum(np.abs(rows).max(1), 1e-5) / 127
        quantised[low : low + 4096] = np.rint(rows / scale[:, None])
    return quantised, scales


class Litespark:
    """The peer's own prefill and decode, its int8 head."""

    def __init__(self, model: bx.BitNetModel, context: int) -> None:
        c, weights = model.config, model._engine.weights
        table = weights.embedding
        if table.dtype != "bf16":
            raise SystemExit(f"{NAME}: found an embedding of {table.dtype}, wanted bf16")
        head, scales = _int8_rows(table.data)
        layers = []
        for layer in weights.layers:
            q, k, v = _split(layer.qkv[0].weight, [c.q_size, c.kv_size, c.kv_size])
            gate, up = _split(layer.gate_up[0].weight, [c.intermediate_size] * 2)
            (o,) = _split(layer.o.weight, [c.hidden_size])
            (down,) = _split(layer.down.weight, [c.hidden_size])
            norms = (layer.attn_norm, layer.ffn_norm, layer.o.norm, layer.down.norm)
            layers.append(
                PackedLayer(q, k, v, o, gate, up, down, *(_bf16(norm.weight) for norm in norms))
            )
        config = BitNetConfig(
            hidden_size=c.hidden_size,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
            intermediate_size=c.intermediate_size,
            vocab_size=c.vocab_size,
            max_position_embeddings=c.max_position_embeddings,
            rms_norm_eps=c.norm_eps,
            rope_theta=c.rope_theta,
        )
        self._model = PackedBitNetModel(
            config,
            None,
            _bf16(weights.final_norm.weight),
            layers=layers,
            embed_int8=head,
            embed_scale=scales,
        )
        self.threads = kernel.max_threads()
        self._context = context
        self._state: Any = None

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Logits of the last position; those of the parts before it are not projected."""
        self._state = runtime.init_state(self._model, self._context)
        *parts, last = (ids[low : low + PART] for low in range(0, len(ids), PART))
        for part in parts:
            if runtime._forward_prefill_hidden(self._model, self._state, part) is None:
                raise SystemExit(f"{NAME}: found no product of several tokens at a time")
        return runtime.forward_prefill(self._model, self._state, last)

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        self._state.pos = length

    def decode(self, token: int) -> np.ndarray:
        return runtime.forward_one(self._model, self._state, token)

    def close(self) -> None:
        """Nothing is held beyond this object."""


def _bf16(weight: np.ndarray | None) -> np.ndarray:
    assert weight is not None
    return (np.ascontiguousarray(weight).view(np.uint32) >> 16).astype(np.uint16)
