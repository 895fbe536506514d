"""The vocabulary projection of BitNet-b1.58-2B-4T, whole and through the screen.

The results are checked first: ids and bits of the screened top-k are those of the full product.
Then every way and reading its bytes in one stream a thread run by turns in this process.  Medians;
only ratios mean something on a shared machine.

The hidden states: "random", which no row of the table stands out for, and "trained", whose table
has rows of spread norms, and which point at one.

    python bench/bench_vocab.py [--isa NAME] [--rows 1 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
from limits import Limits
from trained_head import bf16_table, near
from turns import clock, turn

import bitnet_ext as bx
from bitnet_ext import _core

VOCAB, WIDTH = 128256, 2560


def hidden_states(kind: str, table: np.ndarray, rows: int) -> np.ndarray:
    """Of unit variance; "trained": each near a row of the table."""
    if kind == "random":
        return np.random.default_rng(2).standard_normal((rows, WIDTH), np.float32)
    return near((table[1000 : 1000 + rows].astype(np.uint32) << 16).view(np.float32))


class Ways:
    """The ways to the largest logits of one batch of hidden states, each checked."""

    def __init__(self, kind: str, rows: int) -> None:
        self.table = bf16_table(VOCAB, WIDTH, spread=kind == "trained")
        self.x = hidden_states(kind, self.table, rows)
        # One for each k: a screen learns from its calls how many bits to read at first.
        self.screens = {k: _core.VocabScreen(self.table, "bf16") for k in (1, 8)}
        self.codes, self.scales = _core.quantise_head(self.table, "bf16")
        self.full = np.empty((rows, VOCAB), np.float32)
        self.top = np.empty_like(self.full)
        self.keep = [np.empty(0, np.int32)] * rows
        self.runs: dict[str, Callable[[], None]] = {
            "full bf16": lambda: _core.project(self.x, self.table, "bf16", None, None, self.full),
            "screened top-1": lambda: self.screened(1),
            "screened top-8": lambda: self.screened(8),
            "int8 head": lambda: _core.project(
                self.x, self.codes, "int8", self.scales, None, self.full
            ),
        }
        self.runs["full bf16"]()
        self.check(1)
        self.check(8)
        self.bytes = {name: self.count(run) for name, run in self.runs.items()}

    def screened(self, k: int) -> None:
        screen = self.screens[k]
        _core.project_top(self.x, self.table, "bf16", None, screen, k, self.keep, self.top)

    def check(self, k: int) -> None:
        self.screened(k)
        for found, wanted in zip(_core.topk(self.top, k), _core.topk(self.full, k), strict=True):
            np.testing.assert_array_equal(found.view(np.int32), wanted.view(np.int32))

    def count(self, run: Callable[[], None]) -> int:
        with bx.DispatchMetrics() as metrics:
            run()
        assert not any(op == "vocab_screen_fallback" for op, *_ in metrics.as_dict())
        return sum(count.bytes for count in metrics.as_dict().values())


def measure(kind: str, rows: int, repeats: int, limits: Limits) -> list[dict[str, Any]]:
    ways = Ways(kind, rows)
    memory = ways.table.reshape(-1).view(np.uint8)
    seconds: dict[str, list[float]] = {name: [] for name in ways.runs}
    read: dict[str, list[float]] = {name: [] for name in ways.runs}
    for _ in range(repeats):
        for name, run in ways.runs.items():
            size = min(ways.bytes[name], len(memory))
            read[name].append(limits.read(memory[:size]))
            seconds[name].append(turn(run, clock(limits.threads)))
    whole = statistics.median(seconds["full bf16"])
    results = []
    for name in ways.runs:
        median = statistics.median(seconds[name])
        row = {
            "name": name,
            "hidden": kind,
            "rows": rows,
            "isa": bx.get_isa(),
            "threads": limits.threads,
            "bytes": ways.bytes[name],
            "milliseconds": median * 1e3,
            "rate": ways.bytes[name] / median / 1e9,
            "limit": statistics.median(read[name]) / 1e9,
            "over_full": whole / median,
            "best_over_full": min(seconds["full bf16"]) / min(seconds[name]),
        }
        row["ratio"] = row["rate"] / row["limit"]
        results.append(row)
        print(
            f"{name:15} {kind:8} M={rows:<3} {row['bytes'] / 1e6:6.0f} MB {median * 1e3:7.2f} ms"
            f"  {row['rate']:5.1f} GB/s read {row['limit']:5.1f} {row['ratio']:5.0%}"
            f"  {row['over_full']:5.2f}x full (best {row['best_over_full']:.2f}x)",
            flush=True,
        )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 4], help="batch sizes")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    bx.set_isa(options.isa)
    limits = Limits(bx.get_num_threads())
    results = [
        row
        for kind in ("random", "trained")
        for rows in options.rows
        for row in measure(kind, rows, options.repeats, limits)
    ]
    if options.json:
        machine = {"cpu": _core.cpu_brand(), "version": bx.__version__}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
