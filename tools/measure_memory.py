"""Memory and load time of fresh processes on a 2B-shaped checkpoint of random weights.

    python tools/measure_memory.py [--json results.json] [--only NAME ...] [--keep DIRECTORY]

Each figure is the VmHWM of a process of its own, less what it was after the import, beside
``estimate_memory``. ``2b`` and ``16k`` jobs run the whole shape of microsoft/bitnet-b1.58-2B-4T (a
packed file of about 1.2 GB, written here), ``screen`` with the copy that ``decode_topk`` makes,
``16k`` with a longer context; ``growth`` jobs one of
its layers with a vocabulary of 32,768; ``calls`` repeats each entry point 1,000 times on the tiny
model. ``--only`` keeps what the JSON file holds of the others.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, STEPS, LONG = 512, 64, 16384
GROWTH = (1024, 2048, 4096, 8192)
CALLS = 1000
# Name, layers, context, vocabulary; (job, tokens).
SHORT_JOBS = ("load", "prefill+decode", "full", "full, last row", "score", "step loop")
PLAN = [
    ("2b", 30, LONG, 128256, [(job, PROMPT) for job in SHORT_JOBS]),
    ("screen", 30, LONG, 128256, [("generate", PROMPT)]),
    ("16k", 30, LONG, 128256, [(job, LONG) for job in ("full, last row", "prefill", "score")]),
    ("growth", 1, LONG, 32768, [("full, last row", tokens) for tokens in GROWTH]),
]
CONFIG = {
    "architectures": ["BitNetForCausalLM"],
    "model_type": "bitnet",
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_attention_heads": 20,
    "num_key_value_heads": 5,
    "hidden_act": "relu2",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "quantization_config": {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": "offline",
    },
}


# --- the checkpoint ---------------------------------------------------------------------------


def write_checkpoint(directory: Path, layers: int, context: int, vocab: int) -> None:
    """A packed Hugging Face directory of random valid codes, made a tensor at a time."""
    from bitnet_ext.checkpoint.safetensors import write_safetensors

    directory.mkdir(parents=True)
    config = CONFIG | {
        "num_hidden_layers": layers,
        "max_position_embeddings": context,
        "vocab_size": vocab,
    }
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", list(_plan(layers, vocab)))


def _plan(layers: int, vocab: int) -> Iterator[tuple[str, str, tuple[int, ...], Callable[[], Any]]]:
    rng = np.random.default_rng(0)
    code = np.arange(256)
    fields = code[:, None] >> np.arange(0, 8, 2) & 3
    valid = code[(fields != 3).all(1)].astype(np.uint8)  # no field is 3

    def bf16(shape: tuple[int, ...], center: float, spread: float) -> Callable[[], Any]:
        def make() -> Any:
            block = rng.standard_normal((min(shape[0], 4096), *shape[1:]), np.float32)
            bits = ((block * np.float32(spread) + np.float32(center)).view(np.uint32) >> 16).astype(
                np.uint16
            )
            return np.resize(bits, shape)

        return make

    def packed(n: int, k: int) -> Callable[[], Any]:
        return lambda: valid[rng.integers(0, len(valid), (n // 4, k), np.uint8)]

    hidden, inner = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    assert isinstance(hidden, int)
    assert isinstance(inner, int)
    kv = 640
    yield "model.embed_tokens.weight", "BF16", (vocab, hidden), bf16((vocab, hidden), 0, 1)
    yield "model.norm.weight", "BF16", (hidden,), bf16((hidden,), 1, 0.1)
    for i in range(layers):
        base = f"model.layers.{i}."
        for name, size in (
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
            ("self_attn.attn_sub_norm", hidden),
            ("mlp.ffn_sub_norm", inner),
        ):
            yield f"{base}{name}.weight", "BF16", (size,), bf16((size,), 1, 0.1)
        for name, n, k in (
            ("self_attn.q_proj", hidden, hidden),
            ("self_attn.k_proj", kv, hidden),
            ("self_attn.v_proj", kv, hidden),
            ("self_attn.o_proj", hidden, hidden),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            yield f"{base}{name}.weight", "U8", (n // 4, k), packed(n, k)
            yield f"{base}{name}.weight_scale", "BF16", (1,), bf16((1,), 0.02, 0)


# --- jobs, each in a process of its own -------------------------------------------------------


def status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status: no {field}")


def _ids(model: Any, count: int) -> Any:
    return np.random.default_rng(1).integers(0, model.config.vocab_size, count)


def _prefill_decode(model: Any, job: str) -> dict[str, float]:
    cache = model.new_cache(max_seq_len=PROMPT + STEPS)
    start = time.perf_counter()
    logits = model.prefill(_ids(model, PROMPT), cache)
    middle = time.perf_counter()
    out = logits[None].copy()
    for _ in range(STEPS):
        if job == "generate":
            model.decode_topk([int(out[0].argmax())], cache, 1)
        else:
            model.decode([int(out[0].argmax())], cache, out=out)
    end = time.perf_counter()
    return {"prefill_s": middle - start, "decode_s": end - middle}


def _job_run(model: Any, job: str, tokens: int) -> dict[str, float]:
    if job == "load":
        return {}
    if job in ("prefill+decode", "generate"):
        return _prefill_decode(model, job)
    ids = _ids(model, tokens)
    start = time.perf_counter()
    if job == "full":
        model.forward_full(ids)
    elif job == "full, last row":
        model.forward_full(ids, logits_to_keep=1)
    elif job == "prefill":
        model.prefill(ids, model.new_cache(max_seq_len=tokens))
    elif job == "score":
        model.token_logprobs([ids])
    elif job == "step loop":
        cache = model.new_cache(max_seq_len=tokens)
        np.concatenate([model.decode(ids[t : t + 1], cache) for t in range(tokens)])
    else:
        raise ValueError(job)
    return {"seconds": time.perf_counter() - start}


def measure_job(path: str, job: str, tokens: int) -> dict[str, Any]:
    """In a fresh process: load, run, and say what it took."""
    import bitnet_ext as bx
    from bitnet_ext.api import BitNetModel

    baseline = status("VmHWM")
    start, worked = time.perf_counter(), time.process_time()
    model = BitNetModel.from_pretrained(path)
    load, worked = time.perf_counter() - start, time.process_time() - worked
    loaded = status("VmHWM") - baseline
    bx.reset_peak_memory()
    times = _job_run(model, job, tokens)
    peak = status("VmHWM") - baseline
    mode = "prefill" if job.startswith("prefill") else "generate" if job == "generate" else "full"
    length = PROMPT + STEPS if job in ("prefill+decode", "generate") else max(tokens, 1)
    estimate = bx.estimate_memory(model.config, 1, length, mode)  # type: ignore[arg-type]
    wanted = {
        "load": estimate.weights - 2 * model.config.vocab_size * model.config.hidden_size,
        "full, last row": estimate.total - estimate.output,
        "score": estimate.total - estimate.output + 4 * 32 * model.config.vocab_size,
    }.get(job, estimate.total)
    return {
        "job": job,
        "tokens": tokens,
        "load_s": load,
        "load_cpu_s": worked,  # of all threads
        "weights": estimate.weights,
        "loaded": loaded,
        "peak": peak,
        "estimate": wanted,
        "counted_peak": bx.memory_stats().peak,
        "rss": status("VmRSS") - baseline,
        **times,
    }


def measure_calls() -> list[dict[str, Any]]:
    """Bytes that each entry point keeps after 1,000 calls on the tiny model."""
    import bitnet_ext as bx
    from bitnet_ext.api import BitNetModel

    model = BitNetModel.random(bx.BitNetConfig.tiny())
    ids = _ids(model, 5)
    cache, steps = model.new_cache(), model.new_cache()

    def prefill() -> None:
        cache.reset()
        model.prefill(ids, cache)

    def decode() -> None:
        if int(steps.length[0]) == 100:
            steps.reset()
        model.decode(ids[:1], steps)

    jobs: dict[str, Callable[[], Any]] = {
        "forward_full": lambda: model.forward_full(ids),
        "prefill": prefill,
        "decode": decode,
        "generate": lambda: model.generate(ids.tolist(), max_new_tokens=3, ignore_eos=True),
    }
    rows = []
    for name, call in jobs.items():
        for _ in range(700):  # first uses; the heap finds its size
            call()
        counted, resident = bx.memory_stats().current, status("VmRSS")
        for _ in range(CALLS):
            call()
        rows.append(
            {
                "job": name,
                "calls": CALLS,
                "counted_growth": bx.memory_stats().current - counted,
                "rss_growth": status("VmRSS") - resident,
            }
        )
    return rows


# --- the report -------------------------------------------------------------------------------


def fresh(*arguments: str) -> Any:
    """What this file, run with ``arguments`` in a new process, prints as JSON."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def machine() -> dict[str, str]:
    """What the figures were taken on."""
    import bitnet_ext as bx
    from bitnet_ext import _core

    return {
        "cpu": _core.cpu_brand(),
        "threads": str(bx.get_num_threads()),
        "isa": bx.get_isa(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": f"{os.getloadavg()[1]:.1f}",  # of five minutes: what else was running
    }


def show_header() -> None:
    print(f"{'model':8}{'job':18}{'tokens':>7}{'load s':>8}{'run s':>8}", end="")
    print(f"{'VmHWM MiB':>11}{'estimate':>10}{'ratio':>7}", flush=True)


def show(row: dict[str, Any]) -> None:
    mib = 1 << 20
    seconds = sum(row.get(k, 0.0) for k in ("seconds", "prefill_s", "decode_s"))
    print(f"{row['model']:8}{row['job']:18}{row['tokens']:7}", end="")
    print(f"{row['load_s']:8.2f}{seconds:8.1f}{row['peak'] / mib:11.0f}", end="")
    ratio = row["peak"] / row["estimate"]
    print(f"{row['estimate'] / mib:10.0f}{ratio:7.2f}", flush=True)


def show_fractions(rows: list[dict[str, Any]]) -> None:
    """What each job of the 2B model needs beside the weights, over what a loop of steps does."""
    loop = next((r for r in rows if r["job"] == "step loop"), None)
    for row in rows if loop else ():
        if row["model"] == loop["model"] and row["job"] != "load":
            fraction = (row["peak"] - row["weights"]) / (loop["peak"] - loop["weights"])
            print(f"{row['job']:18} beside the weights, of the step loop's: {fraction:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=["2b", "screen", "16k", "growth", "calls"])
    parser.add_argument(
        "--keep", type=Path, help="folder of the checkpoints, kept for the next run"
    )
    parser.add_argument("--child", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        job = args.child
        result = measure_job(job[0], job[1], int(job[2])) if job else measure_calls()
        print(json.dumps(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        report = run_all(args.keep or Path(temporary), args.only)
    if args.json:
        old = json.loads(args.json.read_text()) if args.json.exists() else {}
        kept = [row for row in old.get("jobs", []) if row["model"] not in args.only]
        report["jobs"] = kept + report["jobs"]
        report["calls"] = report["calls"] or old.get("calls", [])
        args.json.write_text(json.dumps(report, indent=1) + "\n")


def run_all(folder: Path, only: list[str]) -> dict[str, Any]:
    """Write what is missing, run the jobs, print the tables."""
    rows: list[dict[str, Any]] = []
    show_header()
    for name, layers, context, vocab, jobs in PLAN:
        if name not in only:
            continue
        path = folder / f"layers{layers}"
        if not path.exists():
            write_checkpoint(path, layers, context, vocab)
        (path / "model.safetensors").read_bytes()  # into the page cache
        for job, tokens in jobs:
            rows.append({"model": name, **fresh(str(path), job, str(tokens))})
            show(rows[-1])
    show_fractions(rows)
    calls = fresh() if "calls" in only else []
    for row in calls:
        print(
            f"{row['job']:14}{row['calls']} calls: counted {row['counted_growth']:+} bytes,", end=""
        )
        print(f" resident {row['rss_growth']:+} bytes")
    return {"machine": machine(), "jobs": rows, "calls": calls}


if __name__ == "__main__":
    main()
