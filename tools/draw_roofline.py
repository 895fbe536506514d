"""The CPU's roofline: every test of the model below its own, and the products alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench_ternary import ALL_SHAPES
from drawing import BAR, DOT, LEFT, ROOF, Axes, picture

Load = Callable[[str], dict[str, Any] | None]  # a file of bench/results


def roofs(axes: Axes, ternary: float, floats: float, read: float) -> list[str]:
    """The peaks and the slope of memory, GMAC/s and GB/s."""
    style = f'stroke="{ROOF}" stroke-width="1.5"'
    high = axes.x_range[1]
    parts = []
    for peak, name, dashes in (
        (ternary, "ternary products", ""),
        (floats, "float32", ' stroke-dasharray="5 4"'),
    ):
        parts.append(axes.line((peak / read, peak), (high, peak), style + dashes))
        label = f"{name}: {peak:,.0f} GMAC/s"
        parts.append(axes.text(high, peak, label, -4, -6, "end"))
    low = max(axes.x_range[0], axes.y_range[0] / read)
    parts.append(axes.line((low, low * read), (ternary / read, ternary), style))
    parts.append(axes.text(5, 5 * read, f"memory: {read:.1f} GB/s", -8, -4, "end"))
    return parts


def product_points(load: Load, isa: str) -> list[tuple[str, float, float]]:
    """(name, multiply-adds a byte, GMAC/s) of the ternary products alone, where they were timed."""
    points = []
    for row in (load("ternary") or {"results": []})["results"]:
        if row["isa"] != isa:
            continue
        weights = 4 if row["bits"] == "2" else 5  # a byte
        name = f"{row['name']}, {row['rows']} rows, {row['bits']} bits"
        if row["unit"] == "GB/s":  # packed bytes
            x = float(weights * row["rows"])
            points.append((name, x, x * row["rate"]))
        else:
            n, k = ALL_SHAPES[row["name"].removeprefix("gemm ")]
            m = row["rows"]
            points.append((name, m * n * k / (n * k / weights + m * k + 4 * m * n), row["rate"]))
    return points


def roofline(load: Load) -> str:
    """docs/roofline.svg."""
    data = load("model")
    assert data is not None
    rows = data["results"]
    ternary, floats, read = (
        statistics.median(row[key] for row in rows)
        for key in ("ternary_gmacs", "float_gmacs", "read_gb_per_second")
    )
    axes = Axes((1, 10_000), (10, 1000))
    body = [*axes.grid(), *roofs(axes, ternary, floats, read)]
    placed: list[tuple[float, float, float]] = []  # of labels: left, right, bottom
    for name, x, y in product_points(load, data["machine"]["isa"]):
        at = axes.at(x, y)
        body.append(
            f'<rect x="{at[0] - 3:.1f}" y="{at[1] - 3:.1f}" width="6" height="6" fill="none" '
            f'stroke="{DOT}"><title>{name}</title></rect>'
        )
    for row in rows:
        macs = row["macs"]
        x = macs / row["bytes"]
        y, bound = (
            macs / row["tokens"] * row[key] / 1e9
            for key in ("tokens_per_second", "roofline_tokens_per_second")
        )
        at, top = axes.at(x, y), axes.at(x, bound)[1]
        body.append(
            f'<path d="M{at[0]:.1f} {at[1]:.1f}V{top:.1f}M{at[0] - 5:.1f} {top:.1f}h10" '
            f'stroke="{BAR}" fill="none"/>'
        )
        body.append(f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="3.5" fill="{DOT}"/>')
        # Labels stand to the right of their dots, below those they would cover.
        left, foot = at[0] + 7, at[1] + 4
        right = left + 6.5 * len(row["test"])
        while any(left < b and a < right and abs(foot - c) < 11 for a, b, c in placed):
            foot += 1
        placed.append((left, right, foot))
        body.append(f'<text x="{left:.1f}" y="{foot:.1f}">{row["test"]}</text>')
    machine = data["machine"]
    title = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads: multiply-adds"
    body.append(f'<text x="{LEFT}" y="16">{title} a second (10⁹) over multiply-adds a byte</text>')
    return picture(body)
