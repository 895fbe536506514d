"""Time per token outside attention as the sequence grows: flat, because nothing else looks back.

forward_full of four layers of the 2B shape with a small vocabulary (its one row of logits would
count in short sequences only), checked first.  Wall time less attention's, per token, over that of
as many tokens in sequences of 1024 just before or after: a slow second of a shared machine hits
both.  Medians of the ratios.

    python bench/bench_scaling.py [--repeats 9] [--json FILE]
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
NEIGHBOUR = 1024


def seconds_outside_attention(model: bx.BitNetModel, ids: np.ndarray, calls: int) -> float:
    with bx.DispatchMetrics() as metrics:
        start = time.perf_counter()
        for _ in range(calls):
            model.forward_full(ids, logits_to_keep=1)
        whole = time.perf_counter() - start
    counts = metrics.as_dict().items()
    return whole - sum(count.seconds for (op, *_), count in counts if op == "attention_prefill")


def seconds_of_token(model: bx.BitNetModel, ids: np.ndarray, tokens: int) -> float:
    """Of at least so many tokens."""
    calls = max(1, tokens // len(ids))
    return seconds_outside_attention(model, ids, calls) / (calls * len(ids))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    config = dataclasses.replace(
        bx.BitNetConfig.bitnet_2b_4t(),
        num_layers=4,
        vocab_size=1024,
        max_position_embeddings=max(LENGTHS),
    )
    model = bx.BitNetModel.random(config)
    check_model(model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, max(LENGTHS))
    seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}
    ratios: dict[int, list[float]] = {length: [] for length in LENGTHS}
    for turn in range(options.repeats + 1):
        for length in LENGTHS:
            order = slice(None, None, 1 if turn % 2 else -1)
            pair = [NEIGHBOUR, length][order]
            found = [seconds_of_token(model, ids[:n], max(NEIGHBOUR, length)) for n in pair]
            beside, taken = found[order]
            if turn:  # the first warms up
                seconds[length].append(taken)
                ratios[length].append(taken / beside)
    results = [
        {
            "tokens": length,
            "us_per_token": 1e6 * statistics.median(seconds[length]),
            "ratio": statistics.median(ratios[length]),
        }
        for length in LENGTHS
    ]
    for row in results:
        print(f"{row['tokens']:6} tokens {row['us_per_token']:8.1f} us/token {row['ratio']:6.2f}")
    if options.json:
        machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "threads": bx.get_num_threads()}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
