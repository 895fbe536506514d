"""A whole model of random weights beside the roofline: prefill, forward_full, score, decode.

The bits of a chunked prefill, of forward_full and of decode are compared first.  Then call and
limits run by turns in this process, and each run is divided by the roofline of its own minute
(bench/roofline.py).  Medians; only ratios mean something on a shared machine.

    python bench/bench_model.py [--preset bitnet_2b_4t] [--only pp512 tg0 ...] [--json FILE]

ppN: prefill of N tokens; ftN: forward_full, every logit; scN: score; tgC[xB]: a step of decode at
a context of C in a batch of B; grC[xB]: the same for the largest logit alone, as greedy text takes
it, through a screen of the vocabulary (the roofline reads six bits of an element); gcC[xB]: the
same with a head in which one row stands out, as a trained one has (four bits); seedTxB:
forward_full over the loop of single steps, and over steps of all sequences (gpt2_small).
forward_full and decode write into one
array of the caller's: 823 MB of fresh logits take the system longer to zero than attention does.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from limits import Limits
from roofline import STEPS, Peaks, Work, call_work, measure_peaks, parse_test, test_work
from same_bits import check_model
from trained_head import with_trained_head

import bitnet_ext as bx
from bitnet_ext import _core

PLAN = ["pp128", "pp512", "pp2048", "ft512", "sc512", "tg0", "tg512", "tg4032"]
PLAN += ["gr0", "gc0", "gr512", "gr0x4", "tg0x2", "tg0x4", "tg0x8", "tg0x16"]
SEED_PLAN = ["seed128x1", "seed512x1", "seed1024x1", "seed512x4", "seed128x8", "seed512x8"]
NOTHING = Work(0, 0, 0)
SEED_RATIOS = {"128x1": 5.6, "512x1": 12, "1024x1": 20, "512x4": 5, "128x8": 14, "512x8": 18}


@dataclass(frozen=True)
class Test:
    name: str
    tokens: int  # per run
    work: Work
    run: Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """Seconds of each turn, their roofline in the same moment, and the peaks around it."""

    seconds: list[float]
    bounds: list[float]
    peaks: list[Peaks]

    @property
    def ms(self) -> float:
        return 1e3 * statistics.median(self.seconds)

    @property
    def part(self) -> float:
        """Of the roofline."""
        return ratio(self.bounds, self.seconds)


def ratio(a: Sequence[float], b: Sequence[float]) -> float:
    """Of the same turns."""
    return statistics.median(x / y for x, y in zip(a, b, strict=True))


class Bench:
    """The tests of one model."""

    def __init__(self, model: bx.BitNetModel) -> None:
        self.model, self.config = model, model.config
        self.limits = Limits(bx.get_num_threads())
        self.data = np.ones(1 << 29, np.uint8)
        self.rng = np.random.default_rng(0)

    def ids(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, self.config.vocab_size, shape)

    def test(self, name: str) -> Test:
        kind, length, batch = parse_test(name)
        make = {
            "pp": self.prefill,
            "ft": self.full,
            "sc": self.score,
            "tg": self.decode,
            "gr": self.greedy,
            "gc": self.confident,
        }[kind]
        return make(name, length, batch)

    def prefill(self, name: str, length: int, batch: int) -> Test:
        ids, cache = self.ids(batch, length), self.model.new_cache(batch, length)

        def run() -> None:
            cache.reset()
            self.model.prefill(ids, cache)

        return Test(name, batch * length, test_work(self.config, name), run)

    def full(self, name: str, length: int, batch: int) -> Test:
        ids, work = self.ids(batch, length), test_work(self.config, name)
        out = np.empty((batch, length, self.config.vocab_size), np.float32)
        return Test(name, batch * length, work, lambda: self.model.forward_full(ids, out=out))

    def score(self, name: str, length: int, batch: int) -> Test:
        texts, work = self.ids(batch, length + 1).tolist(), test_work(self.config, name)
        return Test(name, batch * length, work, lambda: self.model.token_logprobs(texts))

    def decode(self, name: str, context: int, batch: int) -> Test:
        out = np.empty((batch, self.config.vocab_size), np.float32)
        tokens = self.ids(batch, context + STEPS)
        return self.steps(name, self.model, tokens, functools.partial(self.model.decode, out=out))

    def greedy(self, name: str, context: int, batch: int) -> Test:
        tokens = self.ids(batch, context + STEPS)
        return self.steps(name, self.model, tokens, functools.partial(self.model.decode_topk, k=1))

    def confident(self, name: str, context: int, batch: int) -> Test:
        """Greedy steps along the text that a head was made for."""
        text = self.rng.permutation(self.config.vocab_size)[: batch * (context + STEPS + 1)]
        text = text.reshape(batch, -1)
        tokens, wanted = text[:, :-1], text[:, context + 1 :]
        model = with_trained_head(self.model, tokens, wanted)
        found = []

        def step(ids: np.ndarray, cache: Any) -> None:
            found.append(model.decode_topk(ids, cache, 1)[0])

        test = self.steps(name, model, tokens, step)
        test.run()
        np.testing.assert_array_equal(np.hstack(found), wanted)
        return test

    def steps(
        self, name: str, model: bx.BitNetModel, tokens: np.ndarray, step: Callable[..., Any]
    ) -> Test:
        """STEPS single steps along the end of ``tokens`` [B, T]."""
        batch, length = tokens.shape
        context = length - STEPS
        cache = model.new_cache(batch, length)
        if context:
            model.prefill(tokens[:, :context], cache)
        ids = np.ascontiguousarray(tokens[:, context:].T)

        def run() -> None:
            cache.truncate(context)
            for row in ids:
                step(row, cache)

        return Test(name, STEPS * batch, test_work(self.config, name), run)

    # --- measuring ------------------------------------------------------------------------------

    def timed(self, tests: Sequence[Test], repeats: int) -> list[Timing]:
        """All of them by turns."""
        for test in tests:
            test.run()
        found = [Timing([], [], []) for _ in tests]
        for _ in range(repeats):
            for test, timing in zip(tests, found, strict=True):
                self.turn(test, timing)
        return found

    def turn(self, test: Test, timing: Timing) -> None:
        before = measure_peaks(self.limits, bx.get_isa(), self.data)
        start = time.perf_counter()
        test.run()
        timing.seconds.append(time.perf_counter() - start)
        after = measure_peaks(self.limits, bx.get_isa(), self.data)
        timing.bounds.append((before.seconds(test.work) + after.seconds(test.work)) / 2)
        timing.peaks.extend([before, after])

    def measure(self, name: str, repeats: int) -> dict[str, Any]:
        test = self.test(name)
        (timing,) = self.timed([test], repeats)
        seconds, bounds, peaks = timing.seconds, timing.bounds, timing.peaks
        row = {
            "test": name,
            "tokens": test.tokens,
            "macs": test.work.ternary_macs + test.work.float_macs,
            "bytes": test.work.bytes,
            "tokens_per_second": test.tokens / statistics.median(seconds),
            "roofline_tokens_per_second": test.tokens / statistics.median(bounds),
            "ratio": timing.part,
            "best_ratio": min(bounds) / min(seconds),
            "read_gb_per_second": statistics.median(p.read for p in peaks) / 1e9,
            "ternary_gmacs": statistics.median(p.ternary for p in peaks) / 1e9,
            "float_gmacs": statistics.median(p.float for p in peaks) / 1e9,
        }
        print(
            f"{name:10}{row['tokens_per_second']:10.1f}{row['roofline_tokens_per_second']:10.1f}"
            f"{row['ratio']:8.0%}{row['best_ratio']:8.0%}{row['read_gb_per_second']:8.1f}"
            f"{row['ternary_gmacs']:9.0f}{row['float_gmacs']:9.0f}",
            flush=True,
        )
        return row

    def measure_seed(self, name: str, repeats: int) -> dict[str, Any]:
        """forward_full over a loop of single steps with fresh caches and outputs, and over steps of
        all sequences together."""
        length, batch = (int(n) for n in name.removeprefix("seed").split("x"))
        full = self.full(f"ft{length}x{batch}", length, batch)
        tests = [full, self.loop(name, length, batch), self.together(name, length, batch)]
        timings = dict(zip(("full", "loop", "steps"), self.timed(tests, repeats), strict=True))
        row: dict[str, Any] = {"test": name}
        for way, timing in timings.items():
            row |= {f"{way}_ms": timing.ms, f"{way}_part": timing.part}
        one, loop, steps = timings.values()
        row |= {
            "ratio": ratio(loop.seconds, one.seconds),
            "roofline_ratio": ratio(loop.bounds, one.bounds),
            "steps_ratio": ratio(steps.seconds, one.seconds),
            "steps_roofline_ratio": ratio(steps.bounds, one.bounds),
        }
        row["wanted"] = min(SEED_RATIOS.get(name[4:], 5.0), 0.75 * row["roofline_ratio"])
        print(
            f"{name:12} full {one.ms:8.1f} ms ({one.part:.0%})"
            f"  loop {loop.ms:9.1f} ms ({loop.part:.0%}) {row['ratio']:5.1f}x, roofline's"
            f" {row['roofline_ratio']:5.1f}x, wanted {row['wanted']:5.1f}x"
            f"  steps of all {steps.ms:9.1f} ms ({steps.part:.0%}) {row['steps_ratio']:5.1f}x,"
            f" roofline's {row['steps_roofline_ratio']:5.1f}x",
            flush=True,
        )
        return row

    def loop(self, name: str, length: int, batch: int) -> Test:
        """One sequence after the other, one position after the other, everything fresh."""
        ids = self.ids(batch, length)
        one = sum((call_work(self.config, [1], t, 1) for t in range(length)), NOTHING)
        work = Work(*(batch * x for x in vars(one).values()))

        def run() -> None:
            for row in ids:
                self.model.forward_incremental(row)

        return Test(name, batch * length, work, run)

    def together(self, name: str, length: int, batch: int) -> Test:
        """One position of all sequences after the other."""
        ids = np.ascontiguousarray(self.ids(batch, length).T)
        steps = (call_work(self.config, [1] * batch, t, batch) for t in range(length))
        cache = self.model.new_cache(batch, length)
        out = np.empty((batch, self.config.vocab_size), np.float32)

        def run() -> None:
            cache.reset()
            for row in ids:
                self.model.decode(row, cache, out=out)

        return Test(name, batch * length, sum(steps, NOTHING), run)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="bitnet_2b_4t")
    parser.add_argument("--only", nargs="*", help="tests to run")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    bx.set_isa(options.isa)
    bench = Bench(bx.BitNetModel.random(getattr(bx.BitNetConfig, options.preset)()))
    check_model(bench.model)
    machine = {
        "cpu": _core.cpu_brand(),
        "isa": bx.get_isa(),
        "threads": bx.get_num_threads(),
        "version": bx.__version__,
        "preset": options.preset,
    }
    print(f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {options.preset}")
    print(f"{'test':10}{'tokens/s':>10}{'roofline':>10}{'ratio':>8}{'best':>8}{'GB/s':>8}", end="")
    print(f"{'GMAC/s':>9}{'f32':>9}", flush=True)
    plan = options.only or (SEED_PLAN if options.preset == "gpt2_small" else PLAN)
    results = [
        (bench.measure_seed if name.startswith("seed") else bench.measure)(name, options.repeats)
        for name in plan
    ]
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
