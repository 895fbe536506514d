"""Interpolated Kneser-Ney n-grams over any alphabet of at most 4,096 symbols."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
BITS = 12  # a symbol's width inside a key: five of them fit 64 bits


def windows(ids: Ids, order: int) -> Ids:
    """Keys of all ``order``-grams, the oldest symbol in the highest bits."""
    count = len(ids) - order + 1
    key = np.zeros(count, np.int64)
    for i in range(order):
        key = (key << BITS) | ids[i : i + count]
    return key


def lookup(table: Ids, values: Ids, keys: Ids) -> Ids:
    """values[table == key], 0 where absent; ``table`` is sorted."""
    at = np.minimum(np.searchsorted(table, keys), len(table) - 1)
    return np.where(table[at] == keys, values[at], 0)


class KneserNey:
    """The highest order counts occurrences, lower ones the distinct symbols that precede."""

    def __init__(self, ids: Ids, order: int, alphabet: int) -> None:
        self.order, self.alphabet = order, alphabet
        self._levels = []
        keys, counts = np.unique(windows(ids, order), return_counts=True)
        for n in range(order, 0, -1):
            ones, twos = np.count_nonzero(counts == 1), np.count_nonzero(counts == 2)
            discount = ones / max(1, ones + 2 * twos) or 0.5
            contexts, starts = np.unique(keys >> BITS, return_index=True)
            totals = np.add.reduceat(counts, starts)
            kinds = np.diff(np.append(starts, len(keys)))
            self._levels.append((keys, counts, contexts, totals, kinds, discount))
            lower = keys & ((1 << (BITS * (n - 1))) - 1)  # drop the oldest symbol
            keys, counts = np.unique(lower, return_counts=True)
        self._levels.reverse()

    def bits(self, ids: Ids) -> npt.NDArray[np.float64]:
        """-log2 p of ids[order-1:], each given the ``order`` - 1 symbols before it."""
        skip = self.order - 1
        p = np.full(len(ids) - skip, 1.0 / self.alphabet)
        for n, (keys, counts, contexts, totals, kinds, discount) in enumerate(self._levels, 1):
            mine = windows(ids, n)[skip - n + 1 :]
            total = lookup(contexts, totals, mine >> BITS)
            seen = np.maximum(lookup(keys, counts, mine) - discount, 0.0)
            rest = discount * lookup(contexts, kinds, mine >> BITS)
            p = np.where(total > 0, (seen + rest * p) / np.maximum(total, 1), p)
        return -np.log2(p)
