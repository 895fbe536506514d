"""Sampling in plain NumPy and Python integers: the definition that _sampling is held to."""

import numpy as np


def philox4x32(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds of Philox4x32 (Salmon et al., 2011)."""
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [
            (p1 >> 32) ^ c[1] ^ k0,
            p1 & 0xFFFFFFFF,
            (p0 >> 32) ^ c[3] ^ k1,
            p0 & 0xFFFFFFFF,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def uniform(seed: int, position: int) -> float:
    low, high = 0xFFFFFFFF, 32
    a, b, _, _ = philox4x32([position & low, position >> high, 0, 0], [seed & low, seed >> high])
    return ((a >> 5) * 2**26 + (b >> 6)) / 2**53


def penalise(logits: np.ndarray, seen: list[int], penalty: float) -> np.ndarray:
    x = logits.astype(np.float64)
    marks = np.zeros(len(x), bool)
    marks[seen] = True
    return np.where(marks, np.where(x < 0, x * penalty, x / penalty), x)


def probabilities(
    logits: np.ndarray,
    seen: list[int],
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> np.ndarray:
    """What is drawn from, float64 [V]: the processors of transformers in their order."""
    x = penalise(logits, seen, penalty)
    x = (x - x.max()) / temperature
    if 0 < top_k < len(x):
        x[x < np.sort(x)[-top_k]] = -np.inf
    if top_p < 1:
        order = np.lexsort((np.arange(len(x)), -x))  # largest first, then lowest id
        p = np.exp(x[order])
        before = np.concatenate([[0.0], np.cumsum(p)[:-1]])
        removed = before >= top_p * p.sum()
        removed[0] = False
        x[order[removed]] = -np.inf
    p = np.exp(x)
    p[p < min_p] = 0
    return p / p.sum()


def sample(
    logits: np.ndarray,
    seen: list[int],
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> int:
    if temperature == 0 or top_k == 1:
        return int(np.argmax(penalise(logits, seen, penalty)))
    p = probabilities(logits, seen, penalty, temperature, top_k, top_p, min_p)
    return int(np.searchsorted(np.cumsum(p), uniform(seed, position), side="right"))
