"""The screen of a vocabulary table in float64: its copies of the table and its bound, as stated in
csrc/screen/screen.h."""

from __future__ import annotations

import numpy as np


def copies(table):
    """(copies of 4, 6 and 8 bits, scale [V]) of a table [V, E]."""
    most = np.abs(table).max(1).astype(np.float32)
    scale = np.where(most < 2.0**-100, np.float32(0), most / np.float32(127)).astype(np.float64)
    divisor = np.where(scale == 0, np.inf, scale)[:, None]
    codes = np.rint((table / divisor.astype(np.float32)).astype(np.float32)).astype(np.int64) + 128
    values = codes // 16 * 16 - 120.5, codes // 4 * 4 - 126.5, codes - 128
    return [value * scale[:, None] for value in values], scale


def hidden(x):
    """(x as 16-bit integers, their step)."""
    step = np.abs(x).max() / 32512
    return np.rint(x / step), step


def split(x):
    """(norm of x without outliers, sum of |outliers|), the split at its fixed point or 8th pass."""
    size, edge, last = np.abs(x), np.inf, None
    for _ in range(8):
        out = size > edge
        found = np.sqrt((size[~out] ** 2).sum()), size[out].sum()
        if last is not None and found[1] == last[1]:
            break
        edge, last = np.sqrt(12 / len(x)) * found[0], found
    return found


def bounds(table, x, bias):
    """(estimate, reach) of each copy: |logit - estimate| <= reach."""
    table, x = np.asarray(table, np.float64), np.asarray(x, np.float64)
    codes, step = hidden(x)
    rest, outliers = split(x)
    coarse = (codes - ((codes + 128) % 256 - 128)) / 256
    pieces = (256 * np.abs(coarse) + np.abs(codes - 256 * coarse)).sum()
    both = 128 * np.abs(x - step * codes).sum()
    both += (-(-len(x) // 16) + 8) * 2.0**-24 * 127.5 * np.abs(x).sum()
    both += 2.0**-19 * 160 * step * pieces
    result = []
    found, scale = copies(table)
    for copy, most in zip(found, (8.001, 2.001, 0.501), strict=True):
        error = np.where(scale == 0, 0, np.sqrt(((table - copy) ** 2).sum(1)))
        reach = error * rest + scale * (most * outliers + both)
        reach += 2.0**-22 * np.abs(bias) + 2.0**-100 * (1 + np.abs(x).sum())
        result.append((copy @ (codes * step) + bias, reach))
    return result
