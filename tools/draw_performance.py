"""Write docs/performance.md and docs/roofline.svg from bench/results/*.json.

    PYTHONPATH=. python tools/draw_performance.py

tests/test_performance_page.py checks that page, picture and files agree.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
sys.path += [str(ROOT / "bench"), str(ROOT / "bench" / "gpu"), str(ROOT / "tools")]

import draw_gpu  # noqa: E402
import draw_roofline  # noqa: E402
from drawing import rate, table  # noqa: E402
from targets import rows_of  # noqa: E402

Row = dict[str, Any]

INTRO = (
    "# Performance\n\n"
    "Written by `tools/draw_performance.py` from the files in `bench/results`, which the benches "
    "named below write. A kernel, its limit and a peer run by turns in one process; a ratio is "
    "that of the same minute, rates are medians. Every bench checks its results before it times "
    "them.\n"
)

TESTS = (
    "pp: prefill, ft: `forward_full`, sc: `score` of so many tokens. tg: steps of decode after so "
    "many tokens, every logit; gr: the same for the largest logit alone, as greedy `generate` "
    "takes it; gc: with a vocabulary in which one row stands out, as a trained one has. x: "
    "sequences at a time. The roofline is work over what arithmetic and memory did "
    "beside the call: ternary products at the dot product's peak, then attention and vocabulary at "
    "the float peak, or reading every byte once, whichever takes longer (`bench/roofline.py`). "
    "On an AMD with VNNI products pass that peak: table entries are added beside dot products.\n"
)


def load(name: str) -> dict[str, Any] | None:
    path = RESULTS / f"{name}.json"
    found: dict[str, Any] | None = json.loads(path.read_text()) if path.exists() else None
    return found


def section(title: str, bench: str, machine: Row, *parts: str) -> str:
    threads = {1: "1 thread"}.get(machine.get("threads"), f"{machine.get('threads')} threads")
    where = [machine["cpu"], machine.get("isa"), threads if "threads" in machine else None]
    named = ", ".join(word for word in where if word)
    return "\n".join([f"## {title}", f"{named}; `{bench}`.\n", *parts])


# --- tables -------------------------------------------------------------------------------------


def targets_section() -> str:
    data = load("model")
    assert data is not None
    return section(
        "What it is held to",
        "bench/all",
        data["machine"],
        "From the files of the tables below; `bench/all` writes all of them in one run. "
        "[What holds the rows that are missed](missed-targets.md).\n",
        table(["", "wanted", "found"], rows_of(load)),
    )


def overhead_section(data: Row) -> str:
    rows = [
        [
            row["name"].removeprefix("overhead "),
            str(row["threads"]),
            f"{row['step_us']:,.0f}",
            f"{row['outside_us']:,.0f}",
            f"{row['part']:.1%}",
            f"{row['us_per_layer']:.1f}",
        ]
        for row in data["results"]
        if "part" in row
    ]
    header = ["", "threads", "a step, us", "outside kernels, us", "part", "us a layer"]
    machine = {key: value for key, value in data["machine"].items() if key != "threads"}
    return section(
        "A step outside the kernels", "python bench/bench_overhead.py", machine, table(header, rows)
    )


def model_section(data: Row) -> str:
    rows = [
        [
            row["test"],
            rate(row["tokens_per_second"]),
            rate(row["roofline_tokens_per_second"]),
            f"{row['ratio']:.0%}",
        ]
        for row in data["results"]
    ]
    return section(
        "BitNet-b1.58-2B-4T's shape beside its roofline",
        "python bench/bench_model.py",
        data["machine"],
        TESTS,
        table(["test", "tokens/s", "roofline", "ratio"], rows),
        "![roofline](roofline.svg)\n",
        "A dot is a test, the bar above it that test's own roofline: where the vocabulary has its "
        "part, arithmetic ends below the ternary peak. Squares: ternary products alone.\n",
    )


def peers_section(data: Row) -> str:
    rows = [
        [
            row["peer"],
            row["test"]
            + (", 1 thread" if row.get("threads") == 1 else "")
            + (" (its logits are wrong)" if row.get("correlation", 1) < 0.99 else ""),
            rate(row["ours"]),
            rate(row["theirs"]),
            row["unit"],
            f"{row['ratio']:.2f}",
        ]
        for row in data["results"]
    ]
    absent = ", ".join(data.get("absent", []))
    return section(
        "Beside other engines",
        "python bench/bench_peers.py",
        data["machine"],
        *([f"Not there, and nothing is claimed of them: {absent}.\n"] if absent else []),
        "The same random weights in the 2B shape; of torch, its dense int8 product of 512 rows by "
        "the same matrices. Our vocabulary projection is bf16 and exact, litespark's int8, "
        "llama.cpp's Q6_K. litespark takes 64 tokens at a time: of more its logits are wrong with "
        "AVX-512. Beside llama.cpp both run the shape with SiLU, the form it knows.\n",
        table(["peer", "test", "ours", "theirs", "", "ratio"], rows),
    )


def ternary_section(data: Row) -> str:
    rows = [
        [
            row["name"],
            str(row["rows"]),
            row["bits"],
            row["isa"],
            f"{rate(row['rate'])} {row['unit']}",
            f"{rate(row['limit'])} ({row['limit_is']})",
            f"{row['ratio']:.0%}",
        ]
        for row in data["results"]
    ]
    header = ["product", "rows", "bits", "ISA", "rate", "limit", "ratio"]
    return section(
        "Ternary products", "python bench/bench_ternary.py", data["machine"], table(header, rows)
    )


def seed_section(data: Row) -> str:
    names = {"loop": "loop, ms", "steps": "steps of all, ms"}
    ways = [way for way in names if f"{way}_ms" in data["results"][0]]
    rows = [
        [
            row["test"].removeprefix("seed"),
            time_of(row, "full"),
            *(cell for way in ways for cell in over_full(row, way)),
        ]
        for row in data["results"]
    ]
    compared = [word for way in ways for word in (names[way], "ratio", "the rooflines'")]
    return section(
        "`forward_full` over a loop of single steps",
        "python bench/bench_model.py --preset gpt2_small",
        data["machine"],
        "GPT-2 small's shape with ternary weights; tokens x sequences, and what part of its own "
        "roofline each way has. The loop runs one sequence after the other, with fresh caches and "
        "outputs; steps of all take a token of every sequence at a time.\n",
        table(["", "full, ms", *compared], rows),
    )


def over_full(row: Row, way: str) -> list[str]:
    prefix = "" if way == "loop" else f"{way}_"
    return [time_of(row, way), *(f"{row[prefix + key]:.1f}" for key in ("ratio", "roofline_ratio"))]


def time_of(row: Row, way: str) -> str:
    part = f" ({row[f'{way}_part']:.0%})" if f"{way}_part" in row else ""
    return rate(row[f"{way}_ms"]) + part


def scaling_section(data: Row) -> str:
    rows = [
        [str(row["tokens"]), f"{row['us_per_token']:.0f}", f"{row['ratio']:.2f}"]
        for row in data["results"]
    ]
    return section(
        "A token outside attention",
        "python bench/bench_scaling.py",
        data["machine"],
        "`forward_full` of four layers of the 2B shape, wall time less attention's; beside it as "
        "many tokens in sequences of 1024.\n",
        table(["tokens", "us a token", "ratio"], rows),
    )


def attention_section(data: Row) -> str:
    found = {
        (r["threads"], r["dim"], r["name"], r["k_len"]): f"{r['ratio']:.2f}"
        for r in data["results"]
    }
    lengths = sorted({key[-1] for key in found})
    rows = [
        [
            f"{name}, {dim} wide, {threads} thread{'s' if threads > 1 else ''}",
            *(found.get((threads, dim, name, k), "") for k in lengths),
        ]
        for threads, dim, name in sorted({key[:3] for key in found})
    ]
    return section(
        "Attention over torch's `scaled_dot_product_attention`",
        "python bench/bench_attention.py",
        data["machine"],
        f"torch {data['machine']['torch']} in float32; its time over ours, by number of keys; of a "
        "window torch reads a mask. 16 query heads, 4 from 16,384 keys on.\n",
        table(["", *map(str, lengths)], rows),
    )


def masks_section(data: Row) -> str:
    rows = [
        [
            str(row["side"]),
            f"{row['us']['create_out']:.2f}",
            f"{row['of_fill']:.0%}",
            f"{row['over_numpy']:.1f}",
            f"{row['over_torch']:.1f}" if "over_torch" in row else "",
            f"{row['hit_of_miss']:.1%}",
        ]
        for row in data["results"]
    ]
    header = ["side", "us", "of `ndarray.fill`", "over NumPy", "over torch", "hit of a miss"]
    return section(
        "Causal masks from Python",
        "python bench/bench_masks.py",
        data["machine"],
        "float32, into the caller's array beside a fill of it; fresh ones beside NumPy's and "
        "torch's `triu`; `MaskCache`. Below 256 the call is most of the time.\n",
        table(header, rows),
    )


def vocabulary_section(data: Row) -> str:
    rows = [
        [
            row["name"],
            row["hidden"],
            str(row["rows"]),
            f"{row['milliseconds']:.1f}",
            f"{row['bytes'] / 1e6:,.0f}",
            f"{row['over_full']:.2f}",
        ]
        for row in data["results"]
    ]
    first = data["results"][0]
    machine = data["machine"] | {key: first[key] for key in ("isa", "threads")}
    header = ["way", "hidden states", "rows", "ms", "MB", "over the whole product"]
    return section(
        "Vocabulary of 128,256", "python bench/bench_vocab.py", machine, table(header, rows)
    )


def c_section(data: Row) -> str:
    rows = [
        [
            row["name"],
            row["beside"].replace("_", " "),
            f"{rate(row['rate'])} {row['unit']}",
            rate(row["limit"]),
            f"{row['ratio']:.2f}",
        ]
        for row in data["results"]
    ]
    header = ["function", "beside", "rate", "the other's", "ratio"]
    machine = data["machine"] | {"threads": 1}
    return section("The C ABI", "bench/c/run", machine, table(header, rows))


def check_section(data: Row) -> str:
    names = list(dict.fromkeys(name for entry in data.values() for name in entry["ratios"]))
    rows = [
        [
            name.replace("_", " "),
            *(
                f"{entry['ratios'][name]:.2f}" if name in entry["ratios"] else ""
                for entry in data.values()
            ),
        ]
        for name in names
    ]
    machine = {"cpu": next(iter(data.values()))["machine"], "threads": 1}
    return section(
        "Kernel over limit, as `.ci/run` guards it",
        "bench/check",
        machine,
        "A kernel under half of its ratio here fails. Lookup passes the limit of a dot product.\n",
        table(["kernel", *data], rows),
    )


SECTIONS = {
    "model": model_section,
    "peers": peers_section,
    "ternary": ternary_section,
    "seed_table": seed_section,
    "overhead": overhead_section,
    "scaling": scaling_section,
    "attention": attention_section,
    "masks": masks_section,
    "vocab": vocabulary_section,
    "c": c_section,
    "check": check_section,
}


def page() -> str:
    """docs/performance.md; a bench that has left no file has no section."""
    found = [make(data) for name, make in SECTIONS.items() if (data := load(name)) is not None]
    return "\n".join([INTRO, targets_section(), *found, *draw_gpu.sections(load)])


def main() -> None:
    (DOCS / "performance.md").write_text(page())
    (DOCS / "roofline.svg").write_text(draw_roofline.roofline(load))
    gpu = draw_gpu.roofline(load)
    if gpu is not None:
        (DOCS / draw_gpu.PICTURE).write_text(gpu)


if __name__ == "__main__":
    main()
