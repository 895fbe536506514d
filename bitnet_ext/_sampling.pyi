"""Sampling loops: penalty, temperature, top-k, top-p, min-p, one draw; and the generator."""

import numpy as np
import numpy.typing as npt

def philox4x32(
    c0: int, c1: int, c2: int, c3: int, k0: int, k1: int
) -> tuple[int, int, int, int]: ...
def uniform(seed: int, position: int) -> float: ...
def exp(x: float) -> float: ...
def argmax(logits: npt.NDArray[np.float32], seen: npt.NDArray[np.uint8], penalty: float) -> int: ...
def sample(
    logits: npt.NDArray[np.float32],
    seen: npt.NDArray[np.uint8],
    weights: npt.NDArray[np.float64],
    scratch: npt.NDArray[np.int64],
    penalty: float,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
    seed: int,
    position: int,
) -> int: ...
