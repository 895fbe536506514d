"""Runs the C-level bench on the C ABI of the installed package; bench/c/run builds it first.

Kernels and limits run in one process, in random order, several times over; medians.  Results are
checked before anything is measured.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_ternary import SHAPES, random_weight
from limits import PEAKS

import bitnet_ext as bx
from bitnet_ext import _core

VOID, I32, I64, TEXT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_char_p


class Weight(ctypes.Structure):  # bench.h
    _fields_ = (
        ("name", TEXT),
        ("matrix", VOID),
        ("codes", VOID),
        ("n", I64),
        ("k", I64),
        ("bytes", I64),
    )


class Setup(ctypes.Structure):
    _fields_ = (
        ("api", VOID),
        ("peak", TEXT),
        ("threads", I32),
        ("weights", I32),
        ("weight", ctypes.POINTER(Weight)),
    )


class Api:
    """The table of bitnet_ext/capi.h."""

    def __init__(self) -> None:
        capsule = ctypes.pythonapi.PyCapsule_GetPointer
        capsule.restype, capsule.argtypes = VOID, [ctypes.py_object, TEXT]
        self.address = capsule(_core._C_API, b"bitnet_ext._core._C_API")
        second = VOID.from_address(self.address + 16).value
        assert second
        self.ternary_weight = ctypes.PYFUNCTYPE(VOID, ctypes.py_object)(second)


def measure(
    library: ctypes.CDLL, setup: Setup, threads: int, options: argparse.Namespace
) -> dict[str, float]:
    """Median work a second of each bench, in items or bytes."""
    bx.set_num_threads(threads)
    setup.threads = threads
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        words = [
            "bench",
            f"--benchmark_out={file.name}",
            "--benchmark_out_format=json",
            f"--benchmark_repetitions={options.repetitions}",
            f"--benchmark_min_time={options.min_time}",
            f"--benchmark_filter={options.filter}",
            "--benchmark_enable_random_interleaving=true",
            "--benchmark_display_aggregates_only=true",
        ]
        argv = (TEXT * len(words))(*[word.encode() for word in words])
        status = library.bench_run(ctypes.byref(setup), len(words), argv)
        if status:
            raise SystemExit(f"bench_run: status {status}")
        runs = json.load(file)["benchmarks"]
    rates: dict[str, list[float]] = {}
    for run in runs:
        if run["run_type"] == "iteration":
            name = run["run_name"].removesuffix("/real_time").split("/threads:")[0]
            name = name.removesuffix("/real_time")
            rate = run.get("items_per_second", run.get("bytes_per_second"))
            rates.setdefault(name, []).append(rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def compared(rates: dict[str, float], threads: int) -> list[dict[str, Any]]:
    """Each kernel beside each of its limits and rivals."""
    rows = []
    for name, rate in rates.items():
        kind, what, *_ = name.split("/")
        if kind == "mask" and what == "kernel":
            others = ["fresh_loop", "element_loop", "vector_loop", "memory_fill"]
            beside = {other: name.replace("kernel", other) for other in others}
        elif kind in ("gemm", "gemv"):
            limit = "dot_product" if kind == "gemm" else "memory_read"
            beside = {limit: f"limit/{limit}"}
        else:
            continue
        for other, key in beside.items():
            if key in rates:
                rows.append(
                    {
                        "name": name,
                        "threads": threads,
                        "rate": rate / 1e9,
                        "beside": other,
                        "limit": rates[key] / 1e9,
                        "unit": "GMAC/s" if kind == "gemm" else "GB/s",
                        "ratio": rate / rates[key],
                    }
                )
    return sorted(rows, key=lambda row: (row["beside"], natural(row["name"])))


def natural(name: str) -> tuple[str, str, int]:
    kind, what, size = name.split("/")
    return kind, what, int(size)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", required=True, help=argparse.SUPPRESS)
    parser.add_argument("--threads", type=int, nargs="*", default=[1, bx.get_num_threads()])
    parser.add_argument("--layers", type=int, default=10, help="layers that the GEMV runs over")
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--min-time", type=float, default=0.05, help="seconds of a repetition")
    parser.add_argument("--filter", default=".", help="regular expression of benches to run")
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    api = Api()
    packed = [
        random_weight(n, k, "2", layer)
        for layer in range(options.layers)
        for n, k in SHAPES.values()
    ]
    codes = [weight.unpack() for weight in packed[: len(SHAPES)]]
    weights = (Weight * len(packed))()
    for i, weight in enumerate(packed):
        n, k = weight.shape
        weights[i] = Weight(None, api.ternary_weight(weight), None, n, k, weight.nbytes)
    for i, name in enumerate(SHAPES):
        weights[i].name, weights[i].codes = name.encode(), codes[i].ctypes.data
    peak = PEAKS.get(bx.get_isa(), "none").encode()
    setup = Setup(api.address, peak, 0, len(packed), weights)
    library = ctypes.CDLL(options.library)
    rows: list[dict[str, Any]] = []
    for threads in dict.fromkeys(options.threads):
        rows += compared(measure(library, setup, threads, options), threads)
    for row in rows:
        print(
            f"{row['name']:18} {row['threads']} threads  {row['rate']:7.1f} {row['unit']:6}"
            f"  {row['beside']:12} {row['limit']:7.1f}  {row['ratio']:6.2f}"
        )
    if options.json:
        machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "version": bx.__version__}
        Path(options.json).write_text(json.dumps({"machine": machine, "results": rows}, indent=1))


if __name__ == "__main__":
    main()
