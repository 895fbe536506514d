"""Random ternary problems."""

from __future__ import annotations

import numpy as np

BITS = ("2", "1.6")


def random_codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, n, k]).integers(-1, 2, (n, k), np.int8)


def random_q(m: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, m, k]).integers(-128, 128, (m, k)).astype(np.int8)


def product(q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64 [M, N], by way of float64, which holds every partial sum exactly."""
    return (q.astype(np.float64) @ codes.astype(np.float64).T).astype(np.int64)


def source(
    kind: str,
    data: np.ndarray,
    n: int,
    k: int,
    scale: float = 1.0,
    divide: bool = False,
    order: np.ndarray | None = None,
    name: str = "layers.0.q",
) -> tuple:
    return (name, kind, data, n, k, scale, divide, order)
