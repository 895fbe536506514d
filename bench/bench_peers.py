"""The 2B shape beside other engines on the same weights, and its products beside torch's int8.

Every peer is asked for the same logits first, and wrong ones are marked.  Then both run by turns
in this process.  Medians; only ratios mean something on a shared machine.  A peer that cannot be
imported ends the bench with an error, and nothing is claimed of it.

    pip install torch litespark-inference    # beside bitnet_ext
    python bench/bench_peers.py [--peers litespark torch] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

# Before anybody loads OpenMP: threads that spin after a peer's turn would take cores from ours.
os.environ["OMP_WAIT_POLICY"] = "passive"

import numpy as np

import bitnet_ext as bx
from bitnet_ext import _core

PROMPTS = (128, 512)
SHORT_PROMPT = 40
STEPS = 16
GEMM_ROWS = 512
PACKAGES = {"litespark": "litespark-inference", "torch": "torch"}
Row = dict[str, Any]


def by_turns(repeats: int, ours: Callable[[], None], theirs: Callable[[], None]) -> list[float]:
    """Median seconds of both, and the median of their ratio: theirs over ours."""
    ours(), theirs()
    seconds: list[tuple[float, float]] = []
    for _ in range(repeats):
        times = []
        for work in (ours, theirs):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        seconds.append((times[0], times[1]))
    a, b = zip(*seconds, strict=True)
    return [statistics.median(x) for x in (a, b, [y / x for x, y in seconds])]


def row(peer: str, name: str, amount: float, unit: str, medians: list[float], **more: Any) -> Row:
    ours, theirs, ratio = medians
    result = {
        "peer": f"{PACKAGES[peer]} {importlib.metadata.version(PACKAGES[peer])}",
        "test": name,
        "unit": unit,
        "ours": amount / ours,
        "theirs": amount / theirs,
        "ratio": ratio,
        **more,
    }
    print(
        f"{result['peer']:28}{name:16}{result['ours']:9.1f}{result['theirs']:9.1f} {unit:9}"
        f"{ratio:6.2f}x" + ("" if more.get("correlation", 1) > 0.99 else "  its logits are wrong"),
        flush=True,
    )
    return result


def bench_litespark(model: bx.BitNetModel, repeats: int) -> list[Row]:
    """Prefill of prompts, and steps of decode after the shorter one."""
    from peers.litespark import Litespark

    correlations = litespark_correlations(model.config)
    peer = Litespark(model)
    if peer.threads != bx.get_num_threads():
        raise SystemExit(f"litespark runs {peer.threads} threads, we {bx.get_num_threads()}")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.config.vocab_size, max(PROMPTS) + STEPS)
    cache = model.new_cache(max_seq_len=len(ids))
    rows = []
    for length in PROMPTS:
        prompt = ids[:length]
        listed = prompt.tolist()

        def ours(prompt: np.ndarray = prompt) -> None:
            cache.reset()
            model.prefill(prompt, cache)

        def theirs(listed: list[int] = listed) -> None:
            peer.prefill(listed, 1)

        medians = by_turns(repeats, ours, theirs)
        rows.append(
            row(
                "litespark",
                f"pp{length}",
                length,
                "tokens/s",
                medians,
                correlation=correlations[length],
            )
        )
    rows.append(decode_litespark(model, peer, ids, repeats))
    return rows


def litespark_correlations(config: bx.BitNetConfig) -> dict[int, float]:
    """Of the logits after a prompt of each length, over few layers: random ones amplify rounding.

    Stops where a short prompt shows that the weights were not handed over as they are. Longer ones
    are recorded as they come: version 1.0.3 loses its way beyond 64 tokens on AVX-512.
    """
    from peers.litespark import Litespark

    config = dataclasses.replace(config, num_layers=4, vocab_size=4096)
    model = bx.BitNetModel.random(config)
    peer = Litespark(model)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, max(PROMPTS))
    found = {}
    for length in (SHORT_PROMPT, *PROMPTS):
        theirs = peer.prefill(ids[:length].tolist(), 1)
        ours = model.prefill(ids[:length], model.new_cache())
        finite = bool(np.isfinite(theirs).all())
        found[length] = float(np.corrcoef(ours, theirs)[0, 1]) if finite else 0.0
    if found[SHORT_PROMPT] < 0.99:
        raise SystemExit(f"litespark: found a correlation of {found[SHORT_PROMPT]:.3f}")
    return found


def decode_litespark(model: bx.BitNetModel, peer: Any, ids: np.ndarray, repeats: int) -> Row:
    context = PROMPTS[0]
    cache = model.new_cache(max_seq_len=context + STEPS)
    model.prefill(ids[:context], cache)
    out = np.empty((1, model.config.vocab_size), np.float32)

    def ours() -> None:
        cache.truncate(context)
        for token in ids[context : context + STEPS]:
            model.decode(np.array([token]), cache, out=out)

    def theirs() -> None:
        peer.rewind(context)
        for token in ids[context : context + STEPS].tolist():
            peer.decode(token)

    peer.prefill(ids[:context].tolist(), STEPS)
    medians = by_turns(repeats, ours, theirs)
    return row("litespark", f"tg after {context}", STEPS, "tokens/s", medians)


def bench_torch(model: bx.BitNetModel, repeats: int) -> list[Row]:
    """The products of a layer beside torch's dense int8 (oneDNN on most CPUs)."""
    import torch

    torch.set_num_threads(bx.get_num_threads())
    layer = model._engine.weights.layers[0]
    weights = {"qkv": layer.qkv[0], "o": layer.o, "gate_up": layer.gate_up[0]}
    rng = np.random.default_rng(0)
    rows = []
    for name, linear in (weights | {"down": layer.down}).items():
        n, k = linear.weight.shape
        q = rng.integers(-127, 128, (GEMM_ROWS, k)).astype(np.int8)
        dense = torch.from_numpy(np.ascontiguousarray(linear.weight.unpack().T))
        inputs = torch.from_numpy(q)
        got = bx.ternary_matmul(q, linear.weight)
        np.testing.assert_array_equal(got, torch._int_mm(inputs, dense).numpy())
        out, scales = np.empty((GEMM_ROWS, n), np.float32), np.ones(GEMM_ROWS, np.float32)

        def ours(linear: Any = linear, q: Any = q, scales: Any = scales, out: Any = out) -> None:
            _core.ternary_linear(q, scales, linear.weight, None, False, out)

        def theirs(inputs: Any = inputs, dense: Any = dense) -> None:
            torch._int_mm(inputs, dense)

        medians = by_turns(repeats, ours, theirs)
        rows.append(
            row("torch", f"gemm {name}", GEMM_ROWS * n * k / 1e9, "GMAC/s", medians, rows=GEMM_ROWS)
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--preset", default="bitnet_2b_4t")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    model = bx.BitNetModel.random(getattr(bx.BitNetConfig, options.preset)())
    machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "threads": bx.get_num_threads()}
    print(f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {options.preset}")
    print(f"{'peer':28}{'test':16}{'ours':>9}{'theirs':>9}{'ratio':>17}", flush=True)
    benches = {"litespark": bench_litespark, "torch": bench_torch}
    results = [found for peer in options.peers for found in benches[peer](model, options.repeats)]
    if options.json:
        machine |= {"version": bx.__version__, "preset": options.preset}
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
