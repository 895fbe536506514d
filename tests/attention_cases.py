"""Random attention problems and the calls that run them through the kernels."""

import functools
from dataclasses import dataclass

import numpy as np
from reference_attention import causal_attention, rotate, round_kv

import bitnet_ext as bx
from bitnet_ext import _core

# The others differ in integer products only.
FLOAT_ISAS = [name for name in bx.available_isas() if name in ("scalar", "avx2", "avx512")]


@functools.cache
def _tables(half, positions):
    angle = np.arange(positions)[:, None] * 100.0 ** -(np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


@dataclass
class Case:
    """q | k | v of several sequences and the shape of their heads."""

    sequences: list  # float32 [T_b, Hq * Dk + Hkv * (Dk + Dv)]
    q_heads: int
    kv_heads: int
    dk: int
    dv: int
    kv_dtype: str = "f32"
    window_left: int = -1
    rope: bool = True

    @property
    def scale(self):
        return np.float32(self.dk**-0.5)

    @property
    def longest(self):
        return max(1, *(len(s) for s in self.sequences))

    def tables(self, positions):
        return _tables(self.dk // 2, positions) if self.rope else (None, None)

    def new_cache(self, layers=1):
        return _core.KVCache(
            layers,
            len(self.sequences),
            self.kv_heads,
            self.dk,
            self.dv,
            self.longest,
            self.kv_dtype,
        )


def random_case(rng, lengths, q_heads=4, kv_heads=2, dk=16, dv=None, spread=1.0, **options):
    dv = dv or dk
    width = q_heads * dk + kv_heads * (dk + dv)
    rows = [(rng.standard_normal((n, width)) * spread).astype(np.float32) for n in lengths]
    return Case(rows, q_heads, kv_heads, dk, dv, **options)


def int32(values):
    return np.array(values, np.int32)


def step(case, cache, counts, layer=0, commit=True):
    """Append and attend ``counts[b]`` next rows of each sequence; outputs per sequence."""
    held = cache.lengths
    parts = [s[a : a + n] for s, a, n in zip(case.sequences, held, counts, strict=True)]
    qkv = np.concatenate(parts)
    seq = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    pos = np.concatenate([np.arange(a, a + n) for a, n in zip(held, counts, strict=True)])
    starts = int32([0, *np.cumsum(counts)])
    cos, sin = case.tables(case.longest)
    cache.reserve(held + int32(counts))
    _core.rope_append(qkv, cos, sin, cache, layer, seq, int32(pos))
    out = np.full((len(qkv), case.q_heads * case.dv), np.nan, np.float32)
    _core.attend(qkv, cache, layer, starts, held, float(case.scale), out, case.window_left)
    if commit:
        cache.advance(int32(counts))
    return np.split(out, starts[1:-1])


def run(case, chunk=None, cache=None):
    """Whole sequences in chunks of at most ``chunk`` rows each (None: at once)."""
    cache = cache if cache is not None else case.new_cache()
    outs = [[] for _ in case.sequences]
    while True:
        left = [len(s) - n for s, n in zip(case.sequences, cache.lengths, strict=True)]
        counts = [min(n, chunk or n) for n in left]
        if not any(counts):
            return [np.concatenate(o) if o else np.empty(0) for o in outs]
        for o, part in zip(outs, step(case, cache, counts), strict=True):
            o.append(part)


def reference(case):
    """Float64 outputs over K and V rounded as the cache rounds them."""
    outs = []
    for rows in case.sequences:
        n = len(rows)
        q_end = case.q_heads * case.dk
        k_end = q_end + case.kv_heads * case.dk
        q = rows[:, :q_end].reshape(n, case.q_heads, case.dk)
        k = rows[:, q_end:k_end].reshape(n, case.kv_heads, case.dk)
        v = rows[:, k_end:].reshape(n, case.kv_heads, case.dv)
        if case.rope:
            cos, sin = case.tables(case.longest)
            # float32 here: the kernel's products and sums are the same operations.
            q = rotate(q, cos[:n, None], sin[:n, None])
            k = rotate(k, cos[:n, None], sin[:n, None])
        k, v = round_kv(k, case.kv_dtype), round_kv(v, case.kv_dtype)
        out = causal_attention(q, k, v, 0, float(case.scale), case.window_left)
        outs.append(out.reshape(n, case.q_heads * case.dv))
    return outs


def same_bits(a, b):
    return all(x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))
