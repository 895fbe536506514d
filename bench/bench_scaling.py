"""Time per token outside attention as the sequence grows: flat, because nothing else looks back.

forward_full of two layers of the 2B shape with a small vocabulary (its one row of logits would
count in short sequences only), checked first.  The lengths run by turns, so that a slow minute of a
shared machine hits all of them; medians of wall time less attention's, per token, over the shortest
sequence's.

    python bench/bench_scaling.py [--repeats 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time

import numpy as np
from same_bits import check_model

import bitnet_ext as bx
from bitnet_ext import _core

LENGTHS = (128, 256, 512, 1024, 2048, 4096, 8192)


def seconds_outside_attention(model: bx.BitNetModel, ids: np.ndarray) -> float:
    with bx.DispatchMetrics() as metrics:
        start = time.perf_counter()
        model.forward_full(ids, logits_to_keep=1)
        whole = time.perf_counter() - start
    counts = metrics.as_dict().items()
    return whole - sum(count.seconds for (op, *_), count in counts if op == "attention_prefill")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    config = dataclasses.replace(
        bx.BitNetConfig.bitnet_2b_4t(),
        num_layers=2,
        vocab_size=1024,
        max_position_embeddings=max(LENGTHS),
    )
    model = bx.BitNetModel.random(config)
    check_model(model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, max(LENGTHS))
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for turn in range(options.repeats + 1):
        for length in LENGTHS:
            taken = seconds_outside_attention(model, ids[:length])
            if turn:  # the first warms up
                seconds[length].append(taken / length)
    medians = {length: statistics.median(taken) for length, taken in seconds.items()}
    results = [
        {"tokens": n, "us_per_token": 1e6 * s, "ratio": s / medians[LENGTHS[0]]}
        for n, s in medians.items()
    ]
    for row in results:
        print(f"{row['tokens']:6} tokens {row['us_per_token']:8.1f} us/token {row['ratio']:6.2f}")
    if options.json:
        machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "threads": bx.get_num_threads()}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
