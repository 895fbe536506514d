"""The figures a GPU is held to (stated for an H200), beside what the files of bench/gpu say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from targets import Rows, Target, where

Figure = Callable[[Rows, str], float]


def part(key: str, named: str, **wanted: Any) -> Figure:
    """The least of a figure over the rows whose names begin so."""
    return lambda rows, _: min(float(row[key]) for row in chosen(rows, named, wanted))


def over(peer: str, named: str, **wanted: Any) -> Figure:
    """The least ratio to a peer; KeyError where it did not run."""
    return lambda rows, _: min(float(row["over"][peer]) for row in chosen(rows, named, wanted))


def chosen(rows: Rows, named: str, wanted: dict[str, Any]) -> Rows:
    """Rows by the beginning of their names; ``least_x=n``: with an x of n or more.

    Raises:
        ValueError: there is none.
    """
    found = [row for row in rows if row["name"].startswith(named)]
    for key, value in wanted.items():
        if key.startswith("least_"):
            found = [row for row in found if row[key.removeprefix("least_")] >= value]
        else:
            found = where(found, **{key: value})
    if not found:
        raise ValueError(named)
    return found


def seed_ratio(rows: Rows, _: str) -> float:
    return min(row["ratio"] / row["wanted"] for row in chosen(rows, "seed", {}))


def seed_milliseconds(rows: Rows, _: str) -> float:
    bound = [row for row in chosen(rows, "seed", {}) if row["wanted_ms"] is not None]
    return max(row["full_ms"] / row["wanted_ms"] for row in bound)


def shared_heads(rows: Rows, _: str) -> float:
    """Bytes with shared keys and values over those without; both may be none at all."""
    found = {row["kv_heads"] == 1: row["mb"] for row in chosen(rows, "attention beside", {})}
    return (found[True] + 1) / (found[False] + 1)


def failed(stage: str) -> Figure:
    """0 where that stage of tools/gpu_check.sh passed, else 1."""
    return lambda rows, _: float(chosen(rows, stage, {})[0]["result"] != "passed")


def milliseconds(named: str) -> Figure:
    return lambda rows, _: 1e-3 * chosen(rows, named, {})[0]["us"]


def target(what: str, file: str, bound: float, found: Figure, unit: str, **more: bool) -> Target:
    return Target(what, f"gpu_{file}", bound, found, unit, **more)


GPU_TARGETS = [
    target(
        "decode of one, of reading its bytes",
        "model",
        0.5,
        part("of_limit", "tg128", sequences=1),
        "%",
    ),
    target(
        "decode of one, over torch's graph in bfloat16",
        "model",
        2,
        over("torch graph", "tg128", sequences=1),
        "x",
    ),
    target(
        "decode of one, over eager transformers",
        "model",
        5,
        over("transformers", "tg128", sequences=1),
        "x",
    ),
    target(
        "ternary GEMM from 2048 rows, of the int8 rate",
        "ternary",
        0.7,
        part("of_limit", "gemm", least_rows=2048),
        "%",
    ),
    target(
        "ternary GEMM from 2048 rows, over `torch._int_mm`",
        "ternary",
        1,
        over("torch int8", "gemm", least_rows=2048),
        "x",
    ),
    target(
        "half-precision attention from 2048 tokens, over FlashAttention 2",
        "attention",
        1,
        over("torch flash", "prefill f16", least_length=2048),
        "x",
    ),
    target(
        "the same over cuDNN",
        "attention",
        1,
        over("torch cudnn", "prefill f16", least_length=2048),
        "x",
    ),
    target(
        "masks of side 8192 and more, of the copy bandwidth",
        "masks",
        0.8,
        part("of_limit", "causal mask", least_side=8192, dtype="float32"),
        "%",
    ),
    target(
        "masks of side 2048 and more, over this CPU",
        "masks",
        10,
        over("this CPU", "causal mask", least_side=2048, dtype="float32"),
        "x",
    ),
    target("prefill of 8192", "model", 70, milliseconds("pp8192"), " ms", below=True),
    target(
        "`forward_full` (GPT-2 small), of the milliseconds wanted",
        "seed_table",
        1,
        seed_milliseconds,
        "x",
        below=True,
    ),
    target("the same over single steps, of what is wanted", "seed_table", 1, seed_ratio, "x"),
    target(
        "memory of `forward_full` (GPT-2 medium, 8 x 1024), of the estimate",
        "memory",
        1.2,
        part("of_estimate", "forward_full gpt2_medium"),
        "x",
        below=True,
    ),
    target(
        "attention's own memory with shared keys and values, of that without",
        "memory",
        1,
        shared_heads,
        "x",
        below=True,
    ),
    target(
        "transfers and allocations in the hot path (1: a test of it failed)",
        "check",
        0,
        failed("hot path"),
        "",
        below=True,
    ),
]
