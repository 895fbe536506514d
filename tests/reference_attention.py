"""Float64 definition of RoPE and causal attention, one query at a time."""

import numpy as np


def rotate(x, cos, sin):
    """Half-rotation of ``x`` [..., D] by tables [D / 2]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def causal_attention(q, k, v, past, scale, window_left=-1):
    """``q`` [T, Hq, Dk] stands at positions past.. over ``k`` [past + T, Hkv, Dk], ``v``: float64
    [T, Hq, Dv]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for t in range(len(q)):
        low = max(0, past + t - window_left) if window_left >= 0 else 0
        for h in range(q.shape[1]):
            keys = k[low : past + t + 1, h // group]
            scores = scale * (keys @ q[t, h])
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[low : past + t + 1, h // group] / weights.sum()
    return out


def round_kv(x, kv_dtype):
    """``x`` [..., D] as a cache of ``kv_dtype`` gives it back, float64."""
    x = np.asarray(x, np.float32)
    if kv_dtype == "f32":
        return x.astype(np.float64)
    if kv_dtype == "f16":
        return x.astype(np.float16).astype(np.float64)
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / absmax)).clip(-128, 127)
    return codes.astype(np.float64) * (absmax / np.float32(127)).astype(np.float64)
