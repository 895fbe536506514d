"""The forward pass of every family in float64 NumPy, one sequence, nothing shared with the package.

``reference_forward`` also tells how near any activation came to falling the other way in the int8
quantiser: below that distance float32 and float64 may differ by a whole step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Float64 = np.ndarray


@dataclass
class Reference:
    """Logits float64 [T, V], and the smallest distance of x * s to a half-integer."""

    logits: Float64
    margin: float


class _Quantiser:
    def __init__(self) -> None:
        self.margin = 0.5

    def __call__(self, x: Float64) -> tuple[Float64, Float64]:
        s = 127 / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
        scaled = x * s
        # The element that set the scale stands at 127 whatever its rounding.
        inner = np.abs(scaled) < 126.9
        away = np.abs(scaled - np.floor(scaled) - 0.5)[inner]
        self.margin = min(self.margin, float(away.min(initial=0.5)))
        return np.clip(np.rint(scaled), -128, 127), s


def norm(x: Float64, kind: str, weight: Any, bias: Any, eps: float) -> Float64:
    """RMSNorm, LayerNorm or the identity over the last axis."""
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    if weight is not None:
        y = y * np.asarray(weight, np.float64)
    return y if bias is None else y + np.asarray(bias, np.float64)


def activation(x: Float64, name: str) -> Float64:
    """relu2, silu, gelu (erf) or gelu_tanh."""
    if name == "relu2":
        return np.maximum(x, 0) ** 2
    if name == "silu":
        return x / (1 + np.exp(-x))
    if name == "gelu":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def rope(x: Float64, positions: np.ndarray, theta: float) -> Float64:
    """Half-rotation of x [T, H, D]; the angle is the float32 product that models train with."""
    half = x.shape[-1] // 2
    freq = (float(theta) ** -(np.arange(half) / half)).astype(np.float32)
    angle = (positions.astype(np.float32)[:, None] * freq).astype(np.float64)[:, None]
    a, b = x[..., :half], x[..., half:]
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def causal_attention(q: Float64, k: Float64, v: Float64) -> Float64:
    """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq * D]; softmax over keys up to the query's own."""
    t, heads, d = q.shape
    repeat = heads // k.shape[1]
    k, v = np.repeat(k, repeat, 1), np.repeat(v, repeat, 1)
    scores = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(d)
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(t, -1)


def decode_table(table: Any) -> np.ndarray:
    """float64 values of a table of float32, or bits of f16 / bf16."""
    if table.dtype == "bf16":
        return (table.data.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return table.data.view(np.float16 if table.dtype == "f16" else np.float32).astype(np.float64)


def reference_forward(source: Any, ids: list[int]) -> Reference:
    """Run ``ids`` through a weight source whose linear layers are int8 codes with a scale."""
    c = source.config
    quantise = _Quantiser()

    def linear(x: Float64, name: str) -> Float64:
        if c.linear_norm:
            weight = source.dense(name + ".norm.weight")
            x = norm(x, "rms", weight, None, c.linear_norm_eps)
        w = source.ternary(name)
        q, s = quantise(x)
        acc = q @ w.data.T.astype(np.float64)
        y = acc / (w.scale * s) if w.divide else acc / s * w.scale
        return y + source.dense(name + ".bias") if source.has(name + ".bias") else y

    def named_norm(x: Float64, name: str, present: bool = True) -> Float64:
        if not present:
            return x
        bias = source.dense(name + ".bias") if source.has(name + ".bias") else None
        return norm(x, c.norm, source.dense(name + ".weight"), bias, c.norm_eps)

    positions = np.arange(len(ids))
    embedding = decode_table(source.table("embed"))
    x = embedding[ids]
    if c.position == "learned":
        x = x + source.dense("positions")[positions]
    for i in range(c.num_layers):
        p = f"layers.{i}."
        h = named_norm(x, p + "attn_norm")
        qkv = linear(h, p + "qkv") if c.fused_qkv else [linear(h, p + n) for n in "qkv"]
        if c.fused_qkv:
            qkv = np.split(qkv, [c.q_size, c.q_size + c.kv_size], -1)
        q, k, v = (part.reshape(len(ids), -1, c.head_dim) for part in qkv)
        if c.position == "rope":
            q, k = rope(q, positions, c.rope_theta), rope(k, positions, c.rope_theta)
        a = causal_attention(q, k, v)
        x = x + linear(named_norm(a, p + "attn_sub_norm", c.attn_sub_norm), p + "o")
        h = named_norm(x, p + "ffn_norm", c.ffn_norm)
        if c.gated_ffn:
            h = activation(linear(h, p + "gate"), c.hidden_act) * linear(h, p + "up")
        else:
            h = activation(linear(h, p + "up"), c.hidden_act)
        x = x + linear(named_norm(h, p + "ffn_sub_norm", c.ffn_sub_norm), p + "down")
    head = embedding if c.tie_word_embeddings else decode_table(source.table("head"))
    logits = named_norm(x, "final_norm") @ head.T
    if c.head_bias:
        logits = logits + source.dense("head.bias")
    return Reference(logits, quantise.margin)
