"""The figures a CPU is held to, beside what the files in bench/results say of them.

Each target names its file; a file that is missing, or that has no such row, leaves a gap.  A peer
that no registry offers has a row that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Rows = list[dict[str, Any]]
READ = 20.0  # GB/s that a step's tokens a second are stated for


@dataclass(frozen=True)
class Target:
    what: str
    file: str
    bound: float  # at least; at most where `below`
    # Of the file's rows and the model's ISA; or why nothing is claimed.
    found: Callable[[Rows, str], float] | str
    unit: str = ""  # "%": bound and figure are parts of one
    below: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.below else value >= self.bound

    def text(self, value: float) -> str:
        return f"{value:.0%}" if self.unit == "%" else f"{value:.2f}{self.unit}"

    def verdict(self, rows: Rows, isa: str) -> str:
        if isinstance(self.found, str):
            return self.found
        try:
            value = self.found(rows, isa)
        except (KeyError, ValueError):
            return "not measured"
        return self.text(value) + ("" if self.met(value) else ", missed")


def where(rows: Rows, /, **wanted: Any) -> Rows:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def least(rows: Iterable[dict[str, Any]], key: str = "ratio") -> float:
    """KeyError where there is no row."""
    found = [float(row[key]) for row in rows]
    if not found:
        raise KeyError(key)
    return min(found)


def gemm(isa: str | None = None, gpt2: bool = False) -> Callable[[Rows, str], float]:
    def found(rows: Rows, current: str) -> float:
        products = where(rows, isa=isa or current, bits="2", limit_is="peak", unit="GMAC/s")
        shaped = (row for row in products if ("gpt2" in row["name"]) == gpt2)
        return least(row for row in shaped if row["rows"] >= 128)

    return found


def stream(rows: Rows, isa: str) -> float:
    return least(where(rows, name="stream", rows=1, isa=isa, bits="2"))


def dense_weights(rows: Rows, isa: str) -> float:
    """Weights a second of 1.6 bits over those of 2: five and four a byte."""
    dense, plain = (
        least(where(rows, name="stream", rows=1, isa=isa, bits=bits), "rate")
        for bits in ("1.6", "2")
    )
    return 5 * dense / (4 * plain)


def model(test: str) -> Callable[[Rows, str], float]:
    return lambda rows, _: least(where(rows, test=test))


def step_rate(test: str) -> Callable[[Rows, str], float]:
    def found(rows: Rows, _: str) -> float:
        (row,) = where(rows, test=test)
        return float(row["tokens_per_second"] * READ / row["read_gb_per_second"])

    return found


def attention(name: str, *lengths: int) -> Callable[[Rows, str], float]:
    """Of every width and number of threads."""
    return lambda rows, _: least(row for row in where(rows, name=name) if row["k_len"] in lengths)


def peer(name: str, test: str) -> Callable[[Rows, str], float]:
    return lambda rows, _: least(
        row
        for row in rows
        if name in row["peer"]
        and row["test"].startswith(test)
        and row.get("correlation", 1) > 0.99  # nothing is claimed of wrong logits
    )


def dense_int8(rows: Rows, one_thread: bool) -> float:
    """Over torch's products, with one thread or with all."""
    products = (row for row in rows if row["test"].startswith("gemm"))
    return least(row for row in products if (row.get("threads") == 1) == one_thread)


def replaced_loop(rows: Rows, _: str) -> float:
    """Mask fills of side 64 to 512 in C over the loop that they replace."""
    fills = (row for row in where(rows, beside="fresh_loop"))
    return least(row for row in fills if int(row["name"].split("/")[-1]) <= 512)


def spread(rows: Rows, _: str) -> float:
    """The slowest token over the fastest, less one."""
    ratios = [row["ratio"] for row in rows]
    return float(max(ratios) / min(ratios) - 1)


IK_LLAMA = "no claim: not on PyPI"
TARGETS = [
    Target(
        "ternary GEMM, 128 rows and more, of the dot product's peak", "ternary", 0.75, gemm(), "%"
    ),
    Target("the same forced to AVX2, of the `vpmaddubsw` peak", "ternary", 1.2, gemm("avx2"), "%"),
    Target(
        "the same, 512 rows, over torch's dense int8",
        "peers",
        1.3,
        lambda rows, _: dense_int8(rows, one_thread=False),
        "x",
    ),
    Target(
        "the same with one thread",
        "peers",
        1,
        lambda rows, _: dense_int8(rows, one_thread=True),
        "x",
    ),
    Target(
        "ternary GEMM in GPT-2 small's shapes, of the peak", "ternary", 0.75, gemm(gpt2=True), "%"
    ),
    Target("ternary GEMV, 2 bits, of the read bandwidth", "ternary", 0.95, stream, "%"),
    Target("its weights a second with 1.6 bits over 2", "ternary", 1.1, dense_weights, "x"),
    Target("prefill of 512, of the roofline", "model", 0.65, model("pp512"), "%"),
    Target("prefill of 512, over litespark", "peers", 1.6, peer("litespark", "pp512"), "x"),
    Target("prefill of 512, over ik_llama.cpp", "", 4, IK_LLAMA, "x"),
    Target("prefill of 512, over llama.cpp", "peers", 10, peer("TQ2_0", "pp512"), "x"),
    Target("`forward_full` of 512, of the roofline", "model", 0.6, model("ft512"), "%"),
    Target("`score` of 512, of the roofline", "model", 0.6, model("sc512"), "%"),
    Target("greedy decode, random weights, tokens/s for 20 GB/s", "model", 24, step_rate("gr0")),
    Target("the same with a trained head", "model", 28, step_rate("gc0")),
    Target("greedy decode, over ik_llama.cpp", "", 1.9, IK_LLAMA, "x"),
    Target(
        "causal attention over torch, 512 keys",
        "attention",
        1.6,
        attention("self causal", 512),
        "x",
    ),
    Target(
        "causal attention over torch, 2048 keys and more",
        "attention",
        1.3,
        attention("self causal", 2048, 4096, 16384),
        "x",
    ),
    Target(
        "the same with int8 scores",
        "attention",
        2.0,
        attention("self causal int8", 512, 2048, 4096, 16384),
        "x",
    ),
    Target("masks of side 64 to 512 over the loop they replace, in C", "c", 5, replaced_loop, "x"),
    Target(
        "masks of side 512 and more, of `ndarray.fill`",
        "masks",
        0.9,
        lambda rows, _: least((row for row in rows if row["side"] >= 512), "of_fill"),
        "%",
    ),
    Target(
        "a hit of `MaskCache` from side 256 on, of a miss",
        "masks",
        0.1,
        lambda rows, _: max(row["hit_of_miss"] for row in rows if row["side"] >= 256),
        "%",
        below=True,
    ),
    Target(
        "`forward_full` over single steps, of what is wanted (GPT-2 small)",
        "seed_table",
        1.0,
        lambda rows, _: min(row["ratio"] / row["wanted"] for row in rows),
        "x",
    ),
    Target(
        "time of a token outside attention, 128 to 8192 tokens, spread",
        "scaling",
        0.05,
        spread,
        "%",
        below=True,
    ),
    Target(
        "decode outside kernels, part of a 2B step",
        "overhead",
        0.03,
        lambda rows, _: least(where(rows, name="overhead 2B"), "part"),
        "%",
        below=True,
    ),
    Target(
        "decode outside kernels, a layer of a tiny model",
        "overhead",
        30,
        lambda rows, _: least(where(rows, name="overhead tiny"), "us_per_layer"),
        " us",
        below=True,
    ),
    Target(
        "a second thread, prefill of 512",
        "overhead",
        1.9,
        lambda rows, _: least(where(rows, name="threads, pp512"), "speedup"),
        "x",
    ),
]


def rows_of(
    load: Callable[[str], dict[str, Any] | None], targets: Iterable[Target] = TARGETS
) -> list[list[str]]:
    """[what, wanted, found] of every target; `load` reads a file of bench/results."""
    isa = (load("model") or {"machine": {"isa": ""}})["machine"]["isa"]
    rows = []
    for target in targets:
        sign = "at most " if target.below else ""
        found = (load(target.file) or {"results": []})["results"]
        rows.append([target.what, sign + target.text(target.bound), target.verdict(found, isa)])
    return rows
