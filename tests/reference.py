"""Float64 NumPy definitions of the operations, as plainly as they can be written."""

from __future__ import annotations

import math

import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])

ACTIVATIONS = {
    "relu2": lambda x: np.maximum(x, 0.0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def norm(x, weight=None, bias=None, eps=1e-5, kind="rms"):
    """RMSNorm, LayerNorm or nothing, over the last axis."""
    x = np.asarray(x, np.float64)
    if kind == "none":
        return x
    if kind == "layer":
        x = x - x.mean(-1, keepdims=True)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def norm_over(x, weight=None, bias=None, eps=1e-5, kind="rms", axis=-1):
    """The same over the axes from ``axis`` to the last."""
    x = np.asarray(x, np.float64)
    shape = x.shape[axis:]
    flat = (None if p is None else np.reshape(p, -1) for p in (weight, bias))
    return norm(x.reshape(-1, math.prod(shape)), *flat, eps, kind).reshape(x.shape)


def rotary(x, cos, sin, interleaved=False):
    """x [B, H, T, D] turned by cos and sin [B, T, n]: the first 2n of D, pair by pair."""
    y = np.array(x, np.float64)
    n = cos.shape[-1]
    for i in range(n):
        a, b = (2 * i, 2 * i + 1) if interleaved else (i, i + n)
        c, s = (np.asarray(t, np.float64)[:, None, :, i] for t in (cos, sin))
        y[..., a] = x[..., a] * c - x[..., b] * s
        y[..., b] = x[..., b] * c + x[..., a] * s
    return y


def quantise(y):
    """Unrounded ``y * s`` and ``s = 127 / max(absmax, 1e-5)``: round and clamp for the codes."""
    s = 127 / np.maximum(np.abs(y).max(-1), 1e-5)
    return y * s[..., None], s


def activate(x, act, gated):
    """act(x), or act(first half) * second half."""
    x = np.asarray(x, np.float64)
    if not gated:
        return ACTIVATIONS[act](x)
    width = x.shape[-1] // 2
    return ACTIVATIONS[act](x[..., :width]) * x[..., width:]


def log_softmax(x):
    """x - log(sum(exp(x))) over the last axis."""
    x = np.asarray(x, np.float64)
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def topk(x, k):
    """Ids of the k largest, equal values by ascending id, NaN last."""
    x = np.where(np.isnan(x), -np.inf, x.astype(np.float64)), np.isnan(x)
    return np.lexsort((np.arange(x[0].shape[-1]), -x[0], x[1]))[:k]
