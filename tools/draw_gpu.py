"""The GPU's part of docs/performance.md; where bench/gpu has left no files, that it has not run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from drawing import BAR, DOT, LEFT, ROOF, Axes, picture, rate, table
from gpu_targets import GPU_TARGETS
from targets import rows_of

Row = dict[str, Any]
Load = Callable[[str], Row | None]
PICTURE = "roofline-gpu.svg"
HELD = "What a GPU is held to"
NOT_RUN = (
    "The kernels have not run on a GPU yet, so nothing is known of their speed; the figures are "
    "stated for an H200, and `tools/gpu_check.sh` measures them. "
    "[What only a card can settle](missed-targets.md#what-only-a-gpu-can-settle).\n"
)

# File of bench/results: title, what precedes the table.
BENCHES = {
    "model": (
        "BitNet-b1.58-2B-4T's shape on a GPU",
        "pp: prefill of so many tokens beside its multiply-adds at the rates of torch's fastest "
        "int8 and a large float16 product; tg: a step after so many tokens, x: sequences at a "
        "time, beside reading weights, keys and values; gen: greedy `generate`, as a caller waits. "
        "torch graph: the shape in bfloat16 as one CUDA graph.",
    ),
    "ternary": (
        "Ternary products on a GPU",
        "gemv: over copies of a matrix that exceed the cache, beside reading them; gemm: beside "
        "`torch._int_mm`'s fastest product. torch int8 multiplies 32 rows or more.",
    ),
    "attention": (
        "Attention on a GPU",
        "prefill: causal, heads of 128, 16384 tokens in all, beside a large torch product "
        "(float16, else float32); windowed: 1024 keys; ragged: sequences of several lengths; "
        "gradients: beside torch's forward and backward; decode: over a cache of the 2B shape, "
        "beside reading it.",
    ),
    "multi_head": (
        "Multi-head attention on a GPU",
        "Self-attention in float32 with the CPU's bits, launches included, beside a large torch "
        "product at the multiply-adds that are needed.",
    ),
    "masks": ("Causal masks on a GPU", "Beside a copy of their bytes inside the memory."),
    "vocab": ("Vocabulary of 128,256 on a GPU", "Beside reading the bytes that must be read."),
    "rowwise": (
        "Work by rows on a GPU",
        "Of the 2B shape in float32, beside a copy of the bytes that are read and written, or a "
        "read of them; torch's embedding gives bfloat16.",
    ),
    "seed_table": (
        "`forward_full` over a loop of single steps, on a GPU",
        "GPT-2 small's shape with ternary weights; tokens x sequences; what a caller waits for.",
    ),
    "memory": ("Memory of a GPU", "What CuPy's pool holds at the peak."),
    "dispatch": (
        "Arrays of the host, on the CPU and by way of the GPU",
        'Copies there and back included; what `device="auto"` chooses.',
    ),
}
_MEASURES = ("name", "us", "limit", "of_limit", "peer_us", "over")


def sections(load: Load) -> list[str]:
    """What a GPU is held to, and a table of each file."""
    load = _real(load)
    files = {name: data for name in BENCHES if (data := load(f"gpu_{name}")) is not None}
    judged = rows_of(load, GPU_TARGETS)
    if not files:
        rows = [[what, wanted, "not run"] for what, wanted, _ in judged]
        return ["\n".join([f"## {HELD}", NOT_RUN, table(["", "wanted", "found"], rows)])]
    first = next(iter(files.values()))
    found = [_headed(HELD, "all", first, table(["", "wanted", "found"], judged))]
    for name, data in files.items():
        title, text = BENCHES[name]
        parts = [text + "\n", _rows(data["results"])]
        if name == "ternary":
            parts.append(f"![roofline]({PICTURE})\n")
        found.append(_headed(title, f"bench_{name}.py", data, *parts))
    return found


def roofline(load: Load) -> str | None:
    """Products over multiply-adds a byte, under the int8 rate and the memory's; None: no file."""
    data = _real(load)("gpu_ternary")
    if data is None:
        return None
    rows = [row for row in data["results"] if "tops" in row]
    peaks = [_gmacs(row) / row["of_limit"] for row in rows if row.get("limit") == "int8 rate"]
    read = data["limits"]["read_bytes_per_second"] / 1e9
    axes = Axes((1, 10_000), (1e3, 1e6))
    body = axes.grid()
    style = f'stroke="{ROOF}" stroke-width="1.5"'
    low = max(axes.x_range[0], axes.y_range[0] / read)
    peak = max(peaks, default=axes.y_range[1])
    body.append(axes.line((low, low * read), (peak / read, peak), style))
    body.append(axes.text(5, 5 * read, f"memory: {read:,.0f} GB/s", -8, -4, "end"))
    if peaks:
        body.append(axes.line((peak / read, peak), (axes.x_range[1], peak), style))
        label = f"int8 products: {peak:,.0f} GMAC/s"
        body.append(axes.text(axes.x_range[1], peak, label, -4, -6, "end"))
    for row in rows:
        colour = BAR if row["name"].startswith("gemv") else DOT
        x, y = axes.at(row["macs_per_byte"], _gmacs(row))
        name = f"{row['name']}, {row['rows']} rows"
        body.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{name}</title>'
            "</circle>"
        )
    title = f"{data['machine']['card']}: multiply-adds a second (10⁹) over multiply-adds a byte"
    body.append(f'<text x="{LEFT}" y="16">{title}</text>')
    return picture(body)


def _real(load: Load) -> Load:
    """Without files of tiny shapes."""

    def found(name: str) -> Row | None:
        data = load(name)
        return None if data is None or data["machine"].get("smoke") else data

    return found


def _headed(title: str, bench: str, data: Row, *parts: str) -> str:
    machine = data["machine"]
    where = f"{machine['card']}, driver {machine['driver']}, {machine['date']}"
    return "\n".join(
        [f"## {title}", f"{where}, commit {machine['commit'][:10]}; `bench/gpu/{bench}`.\n", *parts]
    )


def _rows(rows: list[Row]) -> str:
    """Every column that some row has."""
    shapes = list(dict.fromkeys(key for row in rows for key in row if key not in _MEASURES))
    peers = list(dict.fromkeys(peer for row in rows for peer in row.get("over", {})))
    measured = [key for key in ("us", "of_limit") if any(key in row for row in rows)]
    titles = {"us": "us", "of_limit": "of the limit"}
    lines = [
        [
            row["name"],
            *(_text(row.get(key)) for key in shapes),
            *(_measure(row, key) for key in measured),
            *(f"{row['over'][p]:.2f}" if p in row.get("over", {}) else "" for p in peers),
        ]
        for row in rows
    ]
    header = ["", *(key.replace("_", " ") for key in shapes), *(titles[key] for key in measured)]
    return table([*header, *(f"over {peer}" for peer in peers)], lines)


def _measure(row: Row, key: str) -> str:
    if key not in row:
        return ""
    return rate(row["us"]) if key == "us" else f"{row['of_limit']:.0%} ({row['limit']})"


def _text(value: Any) -> str:
    if value is None:
        return ""
    return rate(value) if isinstance(value, float) else str(value)


def _gmacs(row: Row) -> float:
    return float(row["tops"] * 500)
