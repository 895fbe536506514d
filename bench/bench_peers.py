"""The 2B shape beside other engines on the same weights, and its products beside torch's int8.

Every peer is asked for the same logits first, and wrong ones are marked.  Then both run by turns
in this process.  Medians; only ratios mean something on a shared machine.  Of a peer that cannot be
imported nothing is claimed: the file names it, and the exit status is 3.

    pip install torch litespark-inference llama-cpp-python    # beside bitnet_ext
    python bench/bench_peers.py [--peers litespark llama_tq2_0] [--json FILE]

ppN: prefill of N tokens, the last logits; tg: steps of decode, every logit; gr: the largest alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from peers import NO_PEER
from turns import by_turns

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.checkpoint import save_gguf

PROMPTS = (128, 512)
SHORT_PROMPT = 40
STEPS = 16
GEMM_ROWS = 512
CONTEXT = max(PROMPTS) + STEPS
PACKAGES = {
    "litespark": "litespark-inference",
    "llama_tq2_0": "llama-cpp-python",
    "llama_tq1_0": "llama-cpp-python",
    "torch": "torch",
}
Row = dict[str, Any]


def compare(repeats: int, ours: Callable[[], None], theirs: Callable[[], None]) -> list[float]:
    """Median seconds of both, and the median of their ratio: theirs over ours."""
    a, b = by_turns({"ours": ours, "theirs": theirs}, repeats, bx.get_num_threads()).values()
    return [statistics.median(x) for x in (a, b, [y / x for x, y in zip(a, b, strict=True)])]


def row(peer: str, name: str, amount: float, unit: str, medians: list[float], **more: Any) -> Row:
    ours, theirs, ratio = medians
    version = importlib.metadata.version(PACKAGES[peer])
    result = {
        "peer": f"{PACKAGES[peer]} {version} {peer.partition('_')[2].upper()}".strip(),
        "test": name,
        "unit": unit,
        "ours": amount / ours,
        "theirs": amount / theirs,
        "ratio": ratio,
        **more,
    }
    label = name + (", 1 thread" if more.get("threads") == 1 else "")
    print(
        f"{result['peer']:32}{label:24}{result['ours']:9.1f}{result['theirs']:9.1f} {unit:9}"
        f"{ratio:6.2f}x" + ("" if more.get("correlation", 1) > 0.99 else "  its logits are wrong"),
        flush=True,
    )
    return result


class Engine(Protocol):
    """What a peer's adapter in bench/peers offers."""

    threads: int

    def prefill(self, ids: list[int]) -> np.ndarray:
        """Logits of the last position."""

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""

    def decode(self, token: int) -> np.ndarray: ...

    def close(self) -> None: ...


Pair = tuple[bx.BitNetModel, Engine]


def litespark(config: bx.BitNetConfig) -> Pair:
    from peers.litespark import Litespark

    model = bx.BitNetModel.random(config)
    return model, Litespark(model, CONTEXT)


def llama_cpp(config: bx.BitNetConfig, kind: str) -> Pair:
    """Both read one file, of the shape's SiLU form, the only one of this family it knows.

    Ours keeps the file's bf16 head, its own is Q6_K: the form that its authors publish.
    """
    from peers.llama_cpp import LlamaCpp, with_own_head

    random = bx.BitNetModel.random(dataclasses.replace(config, hidden_act="silu"))
    with tempfile.TemporaryDirectory() as folder:
        path, own = Path(folder) / "model.gguf", Path(folder) / "own.gguf"
        save_gguf(path, random.config, random._engine.weights, None, kind)
        with_own_head(path, own, kind)
        # Mapped files outlive their names.
        return bx.BitNetModel.from_pretrained(path), LlamaCpp(own, bx.get_num_threads(), CONTEXT)


def bench_engine(
    peer: str, make: Callable[[bx.BitNetConfig], Pair], config: bx.BitNetConfig, repeats: int
) -> list[Row]:
    """Prefill of prompts, then steps of decode after the shorter one: all logits, and greedily."""
    found = correlations(peer, make, config)
    model, engine = make(config)
    if engine.threads != bx.get_num_threads():
        raise SystemExit(f"{peer} runs {engine.threads} threads, we {bx.get_num_threads()}")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, max(PROMPTS) + STEPS)
    cache = model.new_cache(max_seq_len=len(ids))
    rows = []
    for length in PROMPTS:
        prompt = ids[:length]
        listed = prompt.tolist()

        def ours(prompt: np.ndarray = prompt) -> None:
            cache.reset()
            model.prefill(prompt, cache)

        def theirs(listed: list[int] = listed) -> None:
            engine.prefill(listed)

        medians = compare(repeats, ours, theirs)
        more = {"correlation": found[length]}
        rows.append(row(peer, f"pp{length}", length, "tokens/s", medians, **more))
    rows += decode(peer, model, engine, ids, repeats)
    engine.close()
    return rows


def correlations(
    peer: str, make: Callable[[bx.BitNetConfig], Pair], config: bx.BitNetConfig
) -> dict[int, float]:
    """Of the logits after a prompt of each length, over few layers: random ones amplify rounding.

    Stops where a short prompt shows that the weights were not handed over as they are. Longer ones
    are recorded as they come.
    """
    model, engine = make(dataclasses.replace(config, num_layers=4, vocab_size=4096))
    ids = np.random.default_rng(0).integers(0, model.config.vocab_size, max(PROMPTS))
    found = {}
    for length in (SHORT_PROMPT, *PROMPTS):
        theirs = engine.prefill(ids[:length].tolist())
        ours = model.prefill(ids[:length], model.new_cache())
        finite = bool(np.isfinite(theirs).all())
        found[length] = float(np.corrcoef(ours, theirs)[0, 1]) if finite else 0.0
    engine.close()
    if found[SHORT_PROMPT] < 0.99:
        raise SystemExit(f"{peer}: found a correlation of {found[SHORT_PROMPT]:.3f}")
    return found


def decode(
    peer: str, model: bx.BitNetModel, engine: Engine, ids: np.ndarray, repeats: int
) -> list[Row]:
    """Steps that give every logit, and steps that give the largest alone."""
    context = PROMPTS[0]
    cache = model.new_cache(max_seq_len=context + STEPS)
    model.prefill(ids[:context], cache)
    engine.prefill(ids[:context].tolist())
    out = np.empty((1, model.config.vocab_size), np.float32)
    tokens = ids[context : context + STEPS]

    def ours() -> None:
        cache.truncate(context)
        for token in tokens:
            model.decode(np.array([token]), cache, out=out)

    def ours_greedy() -> None:
        cache.truncate(context)
        for token in tokens:
            model.decode_topk(np.array([token]), cache, 1)

    def theirs() -> None:
        engine.rewind(context)
        for token in tokens.tolist():
            engine.decode(token)

    def theirs_greedy() -> None:
        engine.rewind(context)
        for token in tokens.tolist():
            engine.decode(token).argmax()

    return [
        row(peer, f"{name} after {context}", STEPS, "tokens/s", compare(repeats, *works))
        for name, works in {"tg": (ours, theirs), "gr": (ours_greedy, theirs_greedy)}.items()
    ]


def bench_torch(config: bx.BitNetConfig, repeats: int) -> list[Row]:
    """The products of a layer beside torch's dense int8 (oneDNN on most CPUs), with all threads and
    with one."""
    import torch

    threads = bx.get_num_threads()
    model = bx.BitNetModel.random(dataclasses.replace(config, num_layers=1))
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

        for count in dict.fromkeys((threads, 1)):
            bx.set_num_threads(count)
            torch.set_num_threads(count)
            medians = compare(repeats, ours, theirs)
            more = {"rows": GEMM_ROWS, "threads": count}
            rows.append(
                row("torch", f"gemm {name}", GEMM_ROWS * n * k / 1e9, "GMAC/s", medians, **more)
            )
    bx.set_num_threads(threads)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers", nargs="*", choices=list(PACKAGES), default=list(PACKAGES))
    parser.add_argument("--preset", default="bitnet_2b_4t")
    parser.add_argument("--layers", type=int, help="fewer than the preset's, for a quick look")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    config = getattr(bx.BitNetConfig, options.preset)()
    config = dataclasses.replace(config, num_layers=options.layers or config.num_layers)
    machine = {"cpu": _core.cpu_brand(), "isa": bx.get_isa(), "threads": bx.get_num_threads()}
    if options.layers:
        machine["layers"] = options.layers
    print(f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads, {options.preset}")
    print(f"{'peer':32}{'test':24}{'ours':>9}{'theirs':>9}{'ratio':>17}", flush=True)
    benches: dict[str, Callable[[bx.BitNetConfig, int], list[Row]]] = {
        "litespark": partial(bench_engine, "litespark", litespark),
        "llama_tq2_0": partial(bench_engine, "llama_tq2_0", partial(llama_cpp, kind="tq2_0")),
        "llama_tq1_0": partial(bench_engine, "llama_tq1_0", partial(llama_cpp, kind="tq1_0")),
        "torch": bench_torch,
    }
    results, absent = [], []
    for peer in options.peers:
        try:
            results += benches[peer](config, options.repeats)
        except ImportError as error:
            print(f"{PACKAGES[peer]}: {error}; nothing is claimed of it", file=sys.stderr)
            absent.append(PACKAGES[peer])
    if options.json:
        machine |= {"version": bx.__version__, "preset": options.preset}
        found = {"machine": machine, "absent": list(dict.fromkeys(absent)), "results": results}
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    return NO_PEER if absent else 0


if __name__ == "__main__":
    sys.exit(main())
