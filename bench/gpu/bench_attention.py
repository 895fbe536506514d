"""Attention on the card: whole sequences in every precision, and steps of decode over a cache.

"prefill": causal, heads of 128, 16384 tokens in all; "decode": one token a sequence over a cache of
the 2B shape (20 query heads, 5 kv heads).  Limits: the matrix rate of a large torch product
(float16, of "f32" float32) at the work of the keys that are seen; reading keys and values once.
Peers: each backend of torch's scaled_dot_product_attention that takes the shape; of "f32" and
"int8" in float32, of half precision and "int8 f16", int8 scores of float16, in float16.  Some
rows are compared with float64 first.

    PYTHONPATH=. python bench/gpu/bench_attention.py [--lengths 512 8192] [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import BACKENDS, Torch, find_torch

from bitnet_ext.gpu.attend import Precision, StepRoom, attend_step
from bitnet_ext.gpu.attention import AttentionOptions, attention
from bitnet_ext.gpu.kv_append import append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

LENGTHS = (512, 1024, 2048, 4096, 8192)
TOKENS, HEADS, DIM = 16384, 16, 128
DECODE = [(1, 512), (1, 4096), (8, 4096), (64, 1024)]  # sequences, keys
Q_HEADS, KV_HEADS = 20, 5
# Largest error beside the largest value.
BOUNDS = {"f32": 1e-5, "int8": 5e-2, "int8 f16": 5e-2, "f16": 5e-3}


def exact(q: Any, k: Any, v: Any, row: int) -> Any:
    """One query's result over the keys up to it, in float64; q [T, D], k and v [keys, D]."""
    q, k, v = (np.asarray(a, np.float64) for a in (q[row], k[: row + 1], v[: row + 1]))
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


def prefill(bench: Bench, torch: Torch | None, length: int, precision: str) -> None:
    tokens, heads = (length, 2) if bench.smoke else (TOKENS, HEADS)
    shape = (tokens // length, heads, length, DIM)
    dtype = "float16" if precision.endswith("f16") else "float32"
    rng = np.random.default_rng(length)
    host = [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(3)]
    q, k, v = (bench.device.to_device(a) for a in host)
    plain = AttentionOptions(
        *(None, None, None, True, 0, -1, -1, DIM**-0.5, 0.0, 0.0, precision.split()[0], None)
    )

    def kernel() -> Any:
        return attention(bench.device, q, k, v, shape[:1], plain)[0]

    out = bench.device.to_host(kernel()[0, 0])
    error = max(
        close(out[row], exact(*(a[0, 0] for a in host), row), BOUNDS[precision])
        for row in (0, length // 2, length - 1)
    )
    macs = 2 * DIM * heads * shape[0] * length * (length + 1) // 2
    count = 2 if bench.smoke else max(2, 2048 // length)

    def kernels() -> None:  # each gets its output from the pool: launches are not the slower part
        for _ in range(count):
            kernel()

    turns = {"kernel": Turn(kernels, count)}
    if torch is not None:
        turns["limit"] = (torch.float_rate if precision == "f32" else torch.half_rate)(macs)
        operands = [torch.tensor(a) for a in host]
        sdpa = torch.torch.nn.functional.scaled_dot_product_attention
        turns |= peers(bench, torch, lambda: lambda: sdpa(*operands, is_causal=True), count)
    row = bench.add(f"prefill {precision}", turns, "matrix rate", length=length, sequences=shape[0])
    row["tflops"] = 2e-6 * macs / row["us"]
    row["error"] = f"{error:.0e}"


class DecodeShape:
    """A full cache on the device, and a row of q | k | v for each sequence."""

    def __init__(self, bench: Bench, batch: int, keys: int) -> None:
        self.device, self.batch, self.keys = bench.device, batch, keys
        self.cache = DeviceCache(bench.device, 1, batch, KV_HEADS, DIM, DIM, keys + 1, "f16")
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
        whole = np.concatenate([self.filled, self.last[:1]])
        stored = [whole[:, part].astype(np.float16) for part in (k, v)]
        wanted = exact(whole[:, q], *stored, self.keys)
        close(self.device.to_host(self.out)[0, :DIM], wanted, BOUNDS["f16"])


def decode(bench: Bench, torch: Torch | None, batch: int, keys: int) -> None:
    shape = DecodeShape(bench, batch, keys)
    nbytes = 2 * 2 * KV_HEADS * DIM * batch * (keys + 1)
    made: dict[str, Turn] = {}
    if torch is not None:
        q = torch.randn(batch, Q_HEADS, 1, DIM, dtype="float16")
        k, v = (torch.randn(batch, KV_HEADS, keys + 1, DIM, dtype="float16") for _ in range(2))
        sdpa = torch.torch.nn.functional.scaled_dot_product_attention
        made = peers(bench, torch, lambda: lambda: sdpa(q, k, v, enable_gqa=True), 20)
    precisions: tuple[Precision, ...] = ("f32", "f16")
    for precision in precisions:
        shape.check(precision)
        turns = {
            "kernel": bench.graph(lambda p=precision: shape.run(p)),
            "limit": bench.read(nbytes),
            **made,
        }
        bench.add(f"decode {precision}", turns, "read", sequences=batch, keys=keys)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(
        __doc__ or "", arguments, ("--lengths", {"type": int, "nargs": "*", "default": LENGTHS})
    )
    bench = Bench("attention", options)
    torch = find_torch(bench)
    for precision in ("f16", "f32", "int8", "int8 f16"):
        for length in (70,) if bench.smoke else options.lengths:
            prefill(bench, torch, length, precision)
    for batch, keys in [(2, 70)] if bench.smoke else DECODE:
        decode(bench, torch, batch, keys)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
