"""Ternary GEMM and GEMV at the shapes of BitNet-b1.58-2B-4T, and of GPT-2 small, against the
machine's limits.

Each product is checked first.  Then kernel and limits run by turns in this process: the peak of
the ISA's dot product, and reading the same bytes in one stream a thread.  "gemm" repeats one matrix
with many rows, beside the peak; with 2 bits also numbers of rows that no tile divides, and GPT-2
small's matrices.  "stream" runs a few rows over all matrices of some layers, which
exceed the last-level cache, beside the nearer of the two limits: reading them once, multiplying
every row.  Medians; only ratios mean something on a shared machine.  BITNET_NUM_THREADS=1 takes
CPU time, which other processes disturb least.

    python bench/bench_ternary.py [--isa NAME ...] [--bits 2 1.6] [--rows 128 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from limits import Limits
from turns import clock, turn

import bitnet_ext as bx
from bitnet_ext import _core


def shapes_of(config: bx.BitNetConfig) -> dict[str, tuple[int, int]]:
    """[N, K] of the matrices of a layer."""
    hidden, inner = config.hidden_size, config.intermediate_size
    return {
        "qkv": (config.q_size + 2 * config.kv_size, hidden),
        "o": (hidden, config.q_size),
        "gate_up": ((1 + config.gated_ffn) * inner, hidden),
        "down": (hidden, inner),
    }


SHAPES = shapes_of(bx.BitNetConfig.bitnet_2b_4t())
GPT2_SHAPES = {
    f"gpt2 {name}": shape for name, shape in shapes_of(bx.BitNetConfig.gpt2_small()).items()
}
ALL_SHAPES = SHAPES | GPT2_SHAPES
FOUR_CODES = np.array([0x46, 0x91, 0x28, 0x55, 0x1A, 0x64], np.uint8)  # bytes without a field of 3


def random_weight(n: int, k: int, bits: str, seed: int) -> _core.PackedTernary:
    data = np.random.default_rng(seed).choice(FOUR_CODES, (n // 4, k))
    return _core.PackedTernary.from_sources(
        [("bench", "hf", data, n, k, 0.02, False, None)],
        bits,  # type: ignore[arg-type]
    )


@functools.cache
def matrices(layers: int, bits: str) -> list[_core.PackedTernary]:
    """All of some layers."""
    return [random_weight(n, k, bits, layer) for layer in range(layers) for n, k in SHAPES.values()]


def check(weight: _core.PackedTernary, q: np.ndarray, out: np.ndarray, s: np.ndarray) -> None:
    """Some outputs against float64."""
    rng = np.random.default_rng(0)
    columns = rng.integers(0, weight.shape[0], 16)
    codes = weight.unpack()[columns].astype(np.float64)
    acc = (q.astype(np.float64) @ codes.T).astype(np.float32)
    expected = (acc / s[:, None]) * np.float32(weight.scale)
    np.testing.assert_array_equal(out[:, columns], expected)


class Bench:
    def __init__(self, limits: Limits, repeats: int) -> None:
        self.limits, self.repeats, self.clock = limits, repeats, clock(limits.threads)
        self.isa = bx.get_isa()
        self.results: list[dict[str, Any]] = []

    def peak(self) -> float:
        return self.limits.peak(self.isa) or float("nan")

    def product(self, weight: _core.PackedTernary, rows: int) -> Callable[[], None]:
        n, k = weight.shape
        rng = np.random.default_rng(rows)
        q = rng.integers(-128, 128, (rows, k)).astype(np.int8)
        s, out = np.full(rows, 100, np.float32), np.empty((rows, n), np.float32)

        def run() -> None:
            _core.ternary_linear(q, s, weight, None, False, out)

        run()
        check(weight, q, out, s)
        return run

    def gemm(self, name: str, rows: int, bits: str) -> None:
        n, k = ALL_SHAPES[name]
        run = self.product(random_weight(n, k, bits, 0), rows)
        rates, peaks = [], []
        for _ in range(self.repeats):
            peaks.append(self.peak())
            rates.append(rows * n * k / turn(run, self.clock))
        self.add(f"gemm {name}", rows, bits, rates, peaks, "GMAC/s", "peak")

    def stream(self, layers: int, rows: int, storages: list[str]) -> None:
        """Every matrix of some layers in sequence, as a step of decoding runs them; the ways to
        store them by turns."""
        macs = rows * sum(n * k for n, k in SHAPES.values()) * layers
        steps: dict[str, Callable[[], object]] = {}
        read: dict[str, np.ndarray] = {}
        for bits in storages:
            weights = matrices(layers, bits)
            runs = [self.product(weight, rows) for weight in weights]
            steps[bits] = lambda runs=runs: [run() for run in runs]
            read[bits] = np.ones(sum(weight.nbytes for weight in weights), np.uint8)
        rates, reads, computes = ({bits: [] for bits in storages} for _ in range(3))
        for _ in range(self.repeats):
            for bits in storages:
                size = len(read[bits])
                reads[bits].append(self.limits.read(read[bits]))
                computes[bits].append(self.peak() * size / macs)
                rates[bits].append(size / turn(steps[bits], self.clock))
        for bits in storages:
            bound, limit = min(
                (reads[bits], "read"),
                (computes[bits], "peak"),
                key=lambda x: statistics.median(x[0]),
            )
            self.add("stream", rows, bits, rates[bits], bound, "GB/s", limit)

    def add(
        self,
        name: str,
        rows: int,
        bits: str,
        rates: list[float],
        peaks: list[float],
        unit: str,
        limit: str,
    ) -> None:
        rate, peak = statistics.median(rates) / 1e9, statistics.median(peaks) / 1e9
        row = {
            "name": name,
            "rows": rows,
            "bits": bits,
            "isa": self.isa,
            "rate": rate,
            "limit": peak,
            "limit_is": limit,
            "unit": unit,
            "ratio": statistics.median(r / p for r, p in zip(rates, peaks, strict=True)),
            "best_ratio": max(rates) / max(peaks),
        }
        self.results.append(row)
        print(
            f"{name:18}{rows:5}{bits:>5} {self.isa:13}{rate:8.1f}"
            f"{peak:8.1f} {unit:6} {limit:4}{row['ratio']:7.0%}{row['best_ratio']:6.0%}",
            flush=True,
        )


def gemms(options: argparse.Namespace) -> Iterator[tuple[str, int, str]]:
    """(matrix, rows, bits)"""
    for bits in options.bits:
        yield from itertools.product(SHAPES, options.rows, [bits])
    yield from itertools.product(SHAPES, options.ragged_rows, options.bits[:1])
    yield from itertools.product(GPT2_SHAPES, options.gpt2_rows, options.bits[:1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", nargs="*", default=["auto"])
    parser.add_argument("--bits", nargs="*", choices=("2", "1.6"), default=["2", "1.6"])
    parser.add_argument("--rows", type=int, nargs="*", default=[128, 512], help="rows of the GEMMs")
    parser.add_argument("--ragged-rows", type=int, nargs="*", default=[37, 129, 300, 1000])
    parser.add_argument("--gpt2-rows", type=int, nargs="*", default=[128, 300])
    parser.add_argument(
        "--stream-rows", type=int, nargs="*", default=[1, 2, 3, 4, 6, 8, 12, 16], help="few rows"
    )
    parser.add_argument("--layers", type=int, default=10, help="layers that few rows run over")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    limits, results = Limits(bx.get_num_threads()), []
    machine = {"cpu": _core.cpu_brand(), "threads": limits.threads, "version": bx.__version__}
    print(f"{machine['cpu']}, {limits.threads} threads, medians of {options.repeats}")
    print(
        f"{'':18}{'rows':>5}{'bits':>5} {'ISA':13}{'rate':>8}{'limit':>20}{'ratio':>7}{'best':>6}"
    )
    for isa in options.isa:
        bx.set_isa(isa)
        bench = Bench(limits, options.repeats)
        for name, rows, bits in gemms(options):
            bench.gemm(name, rows, bits)
        for rows in options.stream_rows:
            bench.stream(options.layers, rows, options.bits)
        results += bench.results
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
