"""forward_full on the card over the loop of single steps: GPT-2 small's shape, ternary weights.

What a caller waits for, from ids on the host to logits on the card; the loop takes one sequence at
a time, one position at a time, with fresh caches and outputs.  forward_full of a few tokens has the
CPU's bits first.

    PYTHONPATH=. python bench/gpu/bench_seed_table.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
from harness import Bench, Turn, options_of

import bitnet_ext as bx

# (tokens, sequences): the ratio wanted, the milliseconds wanted
WANTED: dict[tuple[int, int], tuple[float, float | None]] = {
    (128, 1): (5.6, 8),
    (512, 1): (12, 15),
    (1024, 1): (20, 35),
    (512, 4): (5, None),
    (128, 8): (14, 25),
    (512, 8): (18, 80),
}


def measure(bench: Bench, model: bx.BitNetModel, length: int, batch: int) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, (batch, length))

    def loop() -> None:
        for row in ids:
            model.forward_incremental(row)

    times = bench.by_turns({"kernel": Turn(lambda: model.forward_full(ids))}, wall=True)
    loop_seconds = bench.clock.wall(loop)
    ratio, milliseconds = WANTED[length, batch]
    bench.rows.append(
        {
            "name": f"seed{length}x{batch}",
            "us": 1e6 * times.median("kernel"),
            "full_ms": 1e3 * times.median("kernel"),
            "loop_ms": 1e3 * loop_seconds,
            "ratio": loop_seconds / times.median("kernel"),
            "wanted": ratio,
            "wanted_ms": milliseconds,
        }
    )


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("forward_full over single steps", options_of(__doc__ or "", arguments))
    config = bx.BitNetConfig.tiny() if bench.smoke else bx.BitNetConfig.gpt2_small()
    model, cpu = (bx.BitNetModel.random(config, device=place) for place in ("cuda", "cpu"))
    ids = np.arange(12) % config.vocab_size
    found = bench.device.to_host(model.forward_full(ids))
    np.testing.assert_array_equal(found, cpu.forward_full(ids))
    del cpu
    if bench.smoke:
        WANTED[6, 2] = (1.0, None)
    for length, batch in [(6, 2)] if bench.smoke else WANTED:
        measure(bench, model, length, batch)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
