"""Causal masks filled on the card beside a copy of their bytes, and beside the CPU's own fill.

PYTHONPATH=. python bench/gpu/bench_masks.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence

import numpy as np
from harness import Bench, options_of
from torch_peer import Torch, find_torch

import bitnet_ext as bx

SIDES = (128, 512, 1024, 2048, 4096, 8192, 16384)


def on_host(bench: Bench, side: int, dtype: str) -> float:
    """Seconds of the CPU's fill of an array of its own, with all threads."""
    out = np.empty((side, side), dtype)
    rounds = 1 + bench.options.repeats
    seconds = [
        bench.clock.wall(lambda: bx.create_causal_mask(side, side, dtype=dtype, out=out))
        for _ in range(rounds)
    ]
    return statistics.median(seconds[1:])


def measure(bench: Bench, torch: Torch | None, side: int, dtype: str) -> None:
    out = bench.device.empty((side, side), dtype)

    def kernel() -> None:
        bx.create_causal_mask(side, side, dtype=dtype, device="cuda", out=out)

    kernel()
    wanted = bx.create_causal_mask(side, side, dtype=dtype)
    np.testing.assert_array_equal(bench.device.to_host(out), wanted)
    # A fill writes and reads nothing, as half of a copy's bytes are.
    turns = {"kernel": bench.graph(kernel), "limit": bench.copy(out.nbytes)}
    if torch is not None:
        empty = torch.tensor(np.full((side, side), -np.inf, np.float32))
        turns["torch triu"] = torch.graph(lambda: torch.torch.triu(empty, 1))
    row = bench.add("causal mask", turns, "copy", side=side, dtype=dtype)
    row["over"]["this CPU"] = on_host(bench, side, dtype) / (1e-6 * row["us"])


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("masks", options_of(__doc__ or "", arguments))
    torch = find_torch(bench)
    for side in (40,) if bench.smoke else SIDES:
        measure(bench, torch, side, "float32")
    measure(bench, torch, 40 if bench.smoke else 8192, "bool")
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
