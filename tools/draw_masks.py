"""Draw docs/masks/*.svg: each pattern of docs/masks.md, from the masks themselves.

PYTHONPATH=. python tools/draw_masks.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import bitnet_ext as bx

OUT = Path(__file__).parents[1] / "docs" / "masks"
CELL, GAP, MARGIN = 18, 2, 34
SEEN, HIDDEN, TEXT = "#2f6f9f", "#e4e8ec", "#57606a"
Mask = npt.NDArray[np.bool_]


def seen(*args: int, **options: Any) -> Mask:
    return bx.create_causal_mask(*args, dtype="bool", **options)


def attended(q_len: int, k_len: int, **options: Any) -> Mask:
    """The keys that attention itself lets each query see."""
    q, k = np.zeros((1, 1, q_len, 1), np.float32), np.zeros((1, 1, k_len, 1), np.float32)
    return np.isfinite(bx.attention(q, k, k, **options, return_scores="mask")[1][0, 0])


def grid(mask: Mask, left: int, title: str, cuts: tuple[int, ...] = ()) -> str:
    """One mask: queries down, keys across; a gap before each row of ``cuts``."""
    parts = [f'<text x="{left}" y="12">{title}</text>']
    for q, row in enumerate(mask):
        y = MARGIN + q * CELL + 6 * sum(q >= cut for cut in cuts)
        parts.append(f'<text x="{left - 8}" y="{y + 12}" text-anchor="end">{q}</text>')
        for k, attends in enumerate(row):
            color = SEEN if attends else HIDDEN
            parts.append(
                f'<rect x="{left + k * CELL}" y="{y}" width="{CELL - GAP}" height="{CELL - GAP}" '
                f'rx="2" fill="{color}"/>'
            )
    for k in range(mask.shape[1]):
        x = left + k * CELL + (CELL - GAP) / 2
        parts.append(f'<text x="{x}" y="{MARGIN - 6}" text-anchor="middle">{k}</text>')
    return "\n".join(parts)


def draw(path: Path, masks: dict[str, Mask], cuts: tuple[int, ...] = ()) -> None:
    """A file with some masks side by side."""
    left, body = MARGIN, []
    for title, mask in masks.items():
        body.append(grid(mask, left, title, cuts))
        left += max(mask.shape[1] * CELL, 7 * len(title)) + MARGIN
    height = MARGIN + max(len(mask) for mask in masks.values()) * CELL + 6 * len(cuts) + 8
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left}" height="{height}" '
        f'font-family="sans-serif" font-size="11" fill="{TEXT}">\n' + "\n".join(body) + "\n</svg>\n"
    )
    path.write_text(svg)


def main(out: Path = OUT) -> None:
    out.mkdir(parents=True, exist_ok=True)
    draw(out / "causal.svg", {"create_causal_mask(8, 8)": seen(8, 8)})
    draw(
        out / "past.svg", {"(3, 8): past_len = 5": seen(3, 8), "(3, 8, past_len=2)": seen(3, 8, 2)}
    )
    draw(out / "window.svg", {"window=(2, -1)": seen(8, 8, window=(2, -1))})
    draw(out / "prefix.svg", {"prefix=3": seen(8, 8, prefix=3)})
    both = {"window=(1, 0), prefix=2": seen(8, 8, window=(1, 0), prefix=2)}
    draw(out / "window_prefix.svg", both)
    batch = bx.create_batch_causal_mask([4, 2], [6, 8], dtype="bool")
    draw(out / "batch.svg", {"q 4, k 6": batch[0], "q 2, k 8": batch[1]})
    blocks = list(bx.iter_causal_mask(8, 8, block=3, dtype="bool"))
    draw(out / "stream.svg", {"block=3": np.concatenate(blocks)}, cuts=(3, 6))
    draw(
        out / "alignment.svg",
        {
            "attention(causal=True)": attended(3, 6, causal=True),
            "past_len=3, or kv_lengths=[6]": attended(3, 6, causal=True, kv_lengths=[6]),
            "create_causal_mask(3, 6)": seen(3, 6),
        },
    )
    draw(out / "extents.svg", {"attention(window=(2, 1))": attended(8, 8, window=(2, 1))})


if __name__ == "__main__":
    main()
