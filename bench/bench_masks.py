"""Causal masks called from Python, beside ndarray.fill, NumPy and torch; cache hits beside misses.

One thread, by its own clock.  Every result is checked first; contenders run by turns and the best
of each counts.  bench/c has the fill without Python, beside the compiled loop that it replaces.
Without torch: exit status 3.

    PYTHONPATH=. python bench/bench_masks.py [--sides 64 128 ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from peers import NO_PEER
from turns import by_turns

import bitnet_ext as bx
from bitnet_ext import _core

try:
    import torch
except ImportError:
    torch = None

ROUNDS = 9


def contenders(n: int) -> dict[str, Callable[[], Any]]:
    out, wanted = np.empty((n, n), np.float32), np.where(np.tri(n, dtype=bool), 0, -np.inf)
    cache = bx.MaskCache()

    def by_numpy() -> np.ndarray:
        return np.triu(np.full((n, n), -np.inf, np.float32), 1)

    def miss() -> np.ndarray:
        cache.clear()
        return cache.get(n, n)

    fresh = {
        "create": lambda: bx.create_causal_mask(n, n),
        "create_out": lambda: bx.create_causal_mask(n, n, out=out),
        "numpy": by_numpy,
        "miss": miss,
        "hit": lambda: cache.get(n, n),
    }
    if torch is not None:
        ready = torch.full((n, n), -torch.inf)
        fresh["torch"] = lambda: torch.triu(torch.full((n, n), -torch.inf), 1)
        fresh["torch_fill"] = lambda: ready.fill_(0)
    for name, function in fresh.items():
        if name != "torch_fill":
            np.testing.assert_array_equal(np.asarray(function()), wanted, err_msg=name)
    return fresh | {"fill": lambda: out.fill(0)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sides", type=int, nargs="*", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    bx.set_num_threads(1)
    if torch is not None:
        torch.set_num_threads(1)
    rows = []
    for n in options.sides:
        found = by_turns(contenders(n), ROUNDS, threads=1)
        seconds = {name: min(taken) for name, taken in found.items()}
        ours = seconds["create_out"]
        row = {
            "side": n,
            "us": {name: value * 1e6 for name, value in seconds.items()},
            "of_fill": seconds["fill"] / ours,
            "over_numpy": seconds["numpy"] / seconds["create"],
            "hit_of_miss": seconds["hit"] / seconds["miss"],
        }
        if torch is not None:
            row["over_torch"] = seconds["torch"] / seconds["create"]
        rows.append(row)
        print(
            f"{n:5} {ours * 1e6:9.2f} us   {row['of_fill']:4.0%} of ndarray.fill"
            f"   {row['over_numpy']:5.1f}x NumPy"
            f"   {row.get('over_torch', float('nan')):5.1f}x torch"
            f"   a hit {row['hit_of_miss']:6.1%} of a miss",
            flush=True,
        )
    if options.json:
        machine = {
            "cpu": _core.cpu_brand(),
            "isa": bx.get_isa(),
            "threads": 1,
            "torch": torch.__version__ if torch is not None else None,
            "version": bx.__version__,
        }
        text = json.dumps({"machine": machine, "results": rows}, indent=1)
        Path(options.json).write_text(text + "\n")
    return 0 if torch is not None else NO_PEER


if __name__ == "__main__":
    sys.exit(main())
