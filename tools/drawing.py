"""Tables and pictures, as the pages of docs have them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 400, 62, 24, 34, 30
DOT, BAR, ROOF, GRID, TEXT = "#2f6f9f", "#c2571a", "#57606a", "#e4e8ec", "#57606a"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column reads, the others count."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def powers(ends: tuple[float, float]) -> list[float]:
    low, high = (round(math.log10(end)) for end in ends)
    return [10.0**power for power in range(low, high + 1)]


class Axes:
    """Both logarithmic: multiply-adds a byte across, multiply-adds a second up."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x_range, self.y_range = x, y

    def x(self, value: float) -> float:
        low, high = map(math.log10, self.x_range)
        return LEFT + (math.log10(value) - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = map(math.log10, self.y_range)
        return HEIGHT - BOTTOM - (math.log10(value) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def line(self, a: tuple[float, float], b: tuple[float, float], style: str) -> str:
        (x1, y1), (x2, y2) = self.at(*a), self.at(*b)
        return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" {style}/>'

    def at(self, x: float, y: float) -> tuple[float, float]:
        return self.x(x), self.y(y)

    def text(self, x: float, y: float, words: str, dx: float, dy: float, anchor: str) -> str:
        return (
            f'<text x="{self.x(x) + dx:.1f}" y="{self.y(y) + dy:.1f}" text-anchor="{anchor}">'
            f"{words}</text>"
        )

    def grid(self) -> list[str]:
        parts = []
        for value in powers(self.x_range):
            low, high = self.y_range
            parts.append(self.line((value, low), (value, high), f'stroke="{GRID}"'))
            parts.append(self.text(value, low, f"{value:,.0f}", 0, 16, "middle"))
        for value in powers(self.y_range):
            low, high = self.x_range
            parts.append(self.line((low, value), (high, value), f'stroke="{GRID}"'))
            parts.append(self.text(low, value, f"{value:,.0f}", -8, 4, "end"))
        return parts


def picture(body: Sequence[str]) -> str:
    """An SVG file of such elements."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="11" fill="{TEXT}">\n'
        + '<rect width="100%" height="100%" fill="#ffffff"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )
