"""Attention on the card: whole sequences in every precision, their gradients, and steps of decode
over a cache.

"prefill": causal, heads of 128, 16384 tokens in all; "windowed": each sees 1024 keys before its
own; "ragged": sequences of several lengths; "gradients": of float32, weights computed again;
"decode": one token a sequence over a cache of the 2B shape (20 query heads, 5 kv heads).  Limits:
the matrix rate of a large torch product (float16, of "f32" and gradients float32) at the work of
the keys that are seen; reading keys and values once.  Peers: each backend of torch's
scaled_dot_product_attention that takes the shape, in the type of the arrays (float16 beside an
int8 cache), its forward and backward beside gradients.  Some rows are compared with float64 first,
gradients with the CPU's.

    PYTHONPATH=. python bench/gpu/bench_attention.py [--lengths 512 8192] [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import BACKENDS, Torch, find_torch

import bitnet_ext as bx
from bitnet_ext.gpu.attend import Precision, StepRoom, attend_step
from bitnet_ext.gpu.attention import AttentionOptions, attention
from bitnet_ext.gpu.kv_append import append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows
from bitnet_ext.memory.kv_cache import KvDtype

LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS, HEADS, DIM = 16384, 16, 128
WINDOW, GRADIENTS = 1024, 2048  # keys before a row's own; tokens of a sequence
DECODE = [(1, 512), (1, 4096), (8, 4096), (64, 1024)]  # sequences, keys
STEPS: list[tuple[Precision, KvDtype]] = [
    ("f32", "f16"),
    ("f16", "f16"),
    ("f32", "f32"),
    ("f32", "int8"),
]
Q_HEADS, KV_HEADS = 20, 5
DTYPES = {  # in the order of what is wanted first, should time run out
    "f16": np.float16,
    "f32": np.float32,
    "int8": np.float32,
    "int8 f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
}
# Largest error beside the largest value.
BOUNDS = {"f32": 1e-5, "int8": 5e-2, "int8 f16": 5e-2, "f16": 5e-3, "bf16": 4e-2}


def exact(q: Any, k: Any, v: Any, row: int, left: int = -1) -> Any:
    """One query's result over the keys up to it, ``left`` before its own at most, in float64; q
    [T, D], k and v [keys, D]."""
    low = max(0, row - left) if left >= 0 else 0
    q, k, v = (np.asarray(a, np.float64) for a in (q[row], k[low : row + 1], v[low : row + 1]))
    scores = k @ q / np.sqrt(len(q))
    weights = np.exp(scores - scores.max())
    return weights @ v / weights.sum()


def close(found: Any, wanted: Any, bound: float) -> float:
    """The largest error beside the largest value."""
    error = np.abs(np.asarray(found, np.float64) - wanted).max() / np.abs(wanted).max()
    if not error <= bound:
        raise SystemExit(f"attention: found an error of {error:.2e}, wanted at most {bound}")
    return float(error)


def peers(
    bench: Bench, torch: Torch, make: Callable[[], Callable[[], object]], count: int
) -> dict[str, Turn]:
    """The backends that take the operands; those that do not say so at the first call."""
    found = {}
    for name in BACKENDS:
        with torch.backend(name):
            work = make()
            try:
                work()
            except RuntimeError as error:  # "No available kernel"
                print(f"torch {name} does not take this: {str(error).splitlines()[0]}")
                continue
            found[f"torch {name}"] = torch.graph(work, count)
    return found


def keys_seen(length: int, lengths: Sequence[int], left: int) -> int:
    """By all queries of sequences of which so many tokens exist, the last of ``length``."""
    seen = np.arange(1, length + 1)
    seen = np.minimum(seen, left + 1) if left >= 0 else seen
    return sum(int(seen[:n].sum()) for n in lengths)


def whole(
    bench: Bench,
    torch: Torch | None,
    kind: str,
    length: int,
    precision: str,
    left: int = -1,
    lengths: Sequence[int] | None = None,
) -> None:
    """Sequences of ``length``, or of ``lengths`` tokens where they are given; rows of their own
    kind, windowed and ragged ones, have no peer."""
    tokens, heads = (length, 2) if bench.smoke else (TOKENS, HEADS)
    shape = (len(lengths) if lengths else tokens // length, heads, length, DIM)
    rng = np.random.default_rng(length)
    host = [rng.standard_normal(shape, np.float32).astype(DTYPES[precision]) for _ in range(3)]
    q, k, v = (bench.device.to_device(a) for a in host)
    exist = bench.device.to_device(np.array(lengths, np.int64)) if lengths else None
    options = AttentionOptions(
        *(None, exist, None, True, 0, left, -1, DIM**-0.5, 0.0, 0.0, precision.split()[0], None)
    )

    def kernel() -> Any:
        return attention(bench.device, q, k, v, shape[:1], options)[0]

    out = bench.device.to_host(kernel()[0, 0])
    error = max(
        close(out[row], exact(*(a[0, 0] for a in host), row, left), BOUNDS[precision])
        for row in (0, length // 2, length - 1)
    )
    macs = 2 * DIM * heads * keys_seen(length, lengths or [length] * shape[0], left)
    count = 2 if bench.smoke else max(2, 2048 // length)
    turns = {"kernel": repeated(kernel, count)}
    if torch is not None:
        turns["limit"] = (torch.float_rate if precision == "f32" else torch.half_rate)(macs)
        if left < 0 and not lengths:
            operands = [torch.tensor(a) for a in host]
            sdpa = torch.torch.nn.functional.scaled_dot_product_attention
            turns |= peers(bench, torch, lambda: lambda: sdpa(*operands, is_causal=True), count)
    row = bench.add(f"{kind} {precision}", turns, "matrix rate", length=length, sequences=shape[0])
    row["tflops"] = 2e-6 * macs / row["us"]
    row["error"] = f"{error:.0e}"


def repeated(kernel: Callable[[], object], count: int) -> Turn:
    """Each call gets its results from the pool: launches are not the slower part."""

    def kernels() -> None:
        for _ in range(count):
            kernel()

    return Turn(kernels, count)


def gradients(bench: Bench, torch: Torch | None, length: int) -> None:
    tokens, heads = (length, 2) if bench.smoke else (TOKENS, HEADS)
    shape = (tokens // length, heads, length, DIM)
    rng = np.random.default_rng(length)
    host = [rng.standard_normal(shape, np.float32) for _ in range(4)]
    arrays = [bench.device.to_device(a) for a in host]

    def kernel() -> Any:
        return bx.attention_backward(*arrays, causal=True)

    wanted = bx.attention_backward(*(a[:1, :1] for a in host), causal=True)
    for found, own in zip(kernel(), wanted, strict=True):
        np.testing.assert_array_equal(bench.device.to_host(found)[:1, :1], own)
    macs = 5 * DIM * heads * keys_seen(length, [length] * shape[0], -1)
    turns = {"kernel": repeated(kernel, 2)}
    if torch is not None:
        turns["limit"] = torch.float_rate(macs)
        d_out, *operands = (torch.tensor(a) for a in host)
        for a in operands:
            a.requires_grad_()
        sdpa = torch.torch.nn.functional.scaled_dot_product_attention

        def both() -> None:
            with torch.torch.enable_grad():
                out = sdpa(*operands, is_causal=True)
                torch.torch.autograd.grad(out, operands, d_out)

        turns["torch autograd"] = repeated(both, 2)
    row = bench.add("gradients f32", turns, "matrix rate", length=length, sequences=shape[0])
    row["tflops"] = 2e-6 * macs / row["us"]


class DecodeShape:
    """A full cache on the device, and a row of q | k | v for each sequence."""

    def __init__(self, bench: Bench, batch: int, keys: int, kv_dtype: KvDtype) -> None:
        self.device, self.batch, self.keys = bench.device, batch, keys
        self.cache = DeviceCache(bench.device, 1, batch, KV_HEADS, DIM, DIM, keys + 1, kv_dtype)
        rng = np.random.default_rng(keys)
        width = (Q_HEADS + 2 * KV_HEADS) * DIM
        filled = rng.standard_normal((keys, width), np.float32)
        for low in range(0, keys, 2048):
            part = np.repeat(filled[None, low : low + 2048], batch, 0)
            rows = DeviceRows.ragged(self.device, [part.shape[1]] * batch)
            append(self.cache, 0, self.device.to_device(part.reshape(-1, width)), rows)
            self._advance(part.shape[1])
        last = rng.standard_normal((batch, width), np.float32)
        self.filled, self.last = filled, last
        self.qkv = self.device.to_device(last)
        self.rows = DeviceRows.one_each(batch)
        self.out = self.device.empty((batch, Q_HEADS * DIM), np.float32)
        self.room = StepRoom.empty(self.cache, Q_HEADS)

    def _advance(self, count: int) -> None:
        self.cache.note([count] * self.batch)
        self.device.write(self.cache.lengths, self.cache.length)

    def run(self, precision: Precision) -> None:
        scale = DIM**-0.5
        attend_step(
            *(self.cache, 0, self.qkv, self.rows, self.out),
            scale=scale,
            precision=precision,
            room=self.room,
        )

    def check(self, precision: Precision) -> None:
        """The first head of the first sequence."""
        self.run(precision)
        q, k, v = (slice(n * DIM, (n + 1) * DIM) for n in (0, Q_HEADS, Q_HEADS + KV_HEADS))
        rows = np.concatenate([self.filled, self.last[:1]])
        dtype = np.float16 if self.cache.kv_dtype == "f16" else np.float32
        stored = [rows[:, part].astype(dtype) for part in (k, v)]
        wanted = exact(rows[:, q], *stored, self.keys)
        bound = BOUNDS["int8" if self.cache.kv_dtype == "int8" else precision]
        close(self.device.to_host(self.out)[0, :DIM], wanted, bound)


def decode(bench: Bench, torch: Torch | None, batch: int, keys: int) -> None:
    made: dict[str, dict[str, Turn]] = {}
    if torch is not None:
        sdpa = torch.torch.nn.functional.scaled_dot_product_attention
        for dtype in ("float32", "float16"):
            q = torch.randn(batch, Q_HEADS, 1, DIM, dtype=dtype)
            k, v = (torch.randn(batch, KV_HEADS, keys + 1, DIM, dtype=dtype) for _ in range(2))
            call = partial(sdpa, q, k, v, enable_gqa=True)
            made[dtype] = peers(bench, torch, lambda call=call: call, 20)
    for precision, kv_dtype in STEPS:
        shape = DecodeShape(bench, batch, keys, kv_dtype)
        shape.check(precision)
        vector = DIM * shape.cache.keys.itemsize + (4 if kv_dtype == "int8" else 0)
        turns = {
            "kernel": bench.graph(partial(shape.run, precision)),
            "limit": bench.read(2 * KV_HEADS * vector * batch * (keys + 1)),
            **made.get("float32" if kv_dtype == "f32" else "float16", {}),
        }
        name = f"decode {precision} over {kv_dtype}"
        bench.add(name, turns, "read", sequences=batch, keys=keys)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(
        __doc__ or "", arguments, ("--lengths", {"type": int, "nargs": "*", "default": LENGTHS})
    )
    bench = Bench("attention", options)
    torch = find_torch(bench)
    for precision in DTYPES:
        for length in (70,) if bench.smoke else options.lengths:
            whole(bench, torch, "prefill", length, precision)
    longest = 70 if bench.smoke else max(options.lengths)
    whole(bench, torch, "windowed", longest, "f16", 20 if bench.smoke else WINDOW)
    parts = [longest * n // 8 for n in (8, 4, 2, 1)]
    whole(bench, torch, "ragged", longest, "f16", lengths=parts)
    gradients(bench, torch, 70 if bench.smoke else GRADIENTS)
    for batch, keys in [(2, 70)] if bench.smoke else DECODE:
        decode(bench, torch, batch, keys)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
