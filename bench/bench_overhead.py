"""What a decode step costs outside the kernels, and what a second thread gains.

Overhead: wall time of single steps less what DispatchMetrics counts inside kernels, of the 2B
shape with every thread and of a small model with one (its kernels are too short to share): as part
of the step, and for each layer; each model is checked first.  Threads: a prefill that arithmetic
bounds, with one thread and with all, by turns; the ratio of their times.  Medians.

    python bench/bench_overhead.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from typing import Any

import numpy as np
from same_bits import check_model

import bitnet_ext as bx
from bitnet_ext import _core

CONTEXT, STEPS, PROMPT = 16, 32, 512
Row = dict[str, Any]


def step_seconds(model: bx.BitNetModel, cache: Any, ids: np.ndarray) -> tuple[float, float]:
    """Seconds of a step, and those outside the kernels."""
    out = np.empty((1, model.config.vocab_size), np.float32)
    cache.truncate(CONTEXT)
    with bx.DispatchMetrics() as metrics:
        start = time.perf_counter()
        for token in ids:
            model.decode(token, cache, out=out)
        whole = time.perf_counter() - start
    inside = sum(count.seconds for count in metrics.as_dict().values())
    return whole / len(ids), (whole - inside) / len(ids)


def overhead(name: str, model: bx.BitNetModel, threads: int, repeats: int) -> Row:
    bx.set_num_threads(threads)
    check_model(model)
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, (STEPS, 1))
    cache = model.new_cache(max_seq_len=CONTEXT + STEPS)
    model.prefill(np.zeros(CONTEXT, np.int32), cache)
    step_seconds(model, cache, ids)
    whole, outside = zip(*(step_seconds(model, cache, ids) for _ in range(repeats)), strict=True)
    step, rest = statistics.median(whole), statistics.median(outside)
    row = {
        "name": f"overhead {name}",
        "threads": threads,
        "step_us": 1e6 * step,
        "outside_us": 1e6 * rest,
        "part": rest / step,
        "us_per_layer": 1e6 * rest / model.config.num_layers,
    }
    print(
        f"{row['name']:24}{threads} threads {row['step_us']:10.0f} us a step, outside kernels "
        f"{row['outside_us']:7.0f} us: {row['part']:6.1%}, {row['us_per_layer']:.1f} us a layer"
    )
    return row


def scaling(model: bx.BitNetModel, threads: int, repeats: int) -> Row:
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, PROMPT)
    cache = model.new_cache(max_seq_len=PROMPT)
    seconds: dict[int, list[float]] = {1: [], threads: []}
    for _ in range(repeats):
        for count, taken in seconds.items():
            bx.set_num_threads(count)
            cache.reset()
            start = time.perf_counter()
            model.prefill(ids, cache)
            taken.append(time.perf_counter() - start)
    one, all_ = (statistics.median(taken) for taken in seconds.values())
    row = {"name": f"threads, pp{PROMPT}", "threads": threads, "speedup": one / all_}
    print(f"{row['name']:24}1 to {threads} threads: {row['speedup']:.2f}x")
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    threads = bx.get_num_threads()
    config = bx.BitNetConfig.bitnet_2b_4t()
    small = dataclasses.replace(bx.BitNetConfig.tiny(), num_layers=24)
    model = bx.BitNetModel.random(config)
    results = [
        overhead("2B", model, threads, options.repeats),
        overhead("tiny", bx.BitNetModel.random(small), 1, 4 * options.repeats),
    ]
    if threads > 1:
        results.append(scaling(model, threads, options.repeats))
    if options.json:
        machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "threads": threads}
        with open(options.json, "w") as file:
            json.dump(
                {"machine": machine | {"version": bx.__version__}, "results": results},
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
