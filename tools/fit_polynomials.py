"""Print the coefficients of csrc/rowwise/math.h: weighted minimax fits, rounded to float32.

Lawson's iteration: least squares on a dense grid, weights multiplied by the error until it is
level. Each coefficient is rounded to float32 and the remaining ones are fitted again, so that the
rounding of the large ones is made good by the small ones. Needs numpy and mpmath.
"""

from collections.abc import Callable

import mpmath
import numpy as np

Function = Callable[[mpmath.mpf], mpmath.mpf]


def lawson(basis: np.ndarray, target: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Coefficients c that make max |(basis @ c - target) * weight| small."""
    power = np.ones_like(target)
    best, least = np.zeros(basis.shape[1]), np.inf
    for _ in range(300):
        root = np.sqrt(power) * weight
        c = np.linalg.lstsq(basis * root[:, None], target * root, rcond=None)[0]
        error = np.abs((basis @ c - target) * weight)
        if error.max() < least:
            best, least = c, error.max()
        power *= error / error.max() + 1e-3
        power /= power.max()
    return best


def fit(name: str, f: Function, weight: Function, low: float, high: float, degree: int) -> None:
    """Fit f on [low, high] and print c[0] .. c[degree], lowest power first."""
    grid = (low + high) / 2 - (high - low) / 2 * np.cos(np.linspace(0, np.pi, 2001))
    grid = grid[grid != 0]
    target = np.array([float(f(mpmath.mpf(x))) for x in grid])
    scale = np.array([float(weight(mpmath.mpf(x))) for x in grid])
    powers = grid[:, None] ** np.arange(degree + 1)
    done: list[float] = []
    for k in range(degree + 1):
        rest = target - powers[:, :k] @ np.array(done)
        done.append(float(np.float32(lawson(powers[:, k:], rest, scale)[0])))
    error = np.abs((powers @ np.array(done) - target) * scale).max()
    print(f"{name}: error {error:.2e}")
    print("  " + ", ".join(f"{c.hex()}f" for c in done))


def main() -> None:
    """Fit every polynomial; the weights turn errors into relative errors of the final result."""
    mpmath.mp.dps = 40
    half = float(mpmath.log(2) / 2) * 1.001
    fit("exp: (e^r - 1 - r) / r^2", lambda r: (mpmath.expm1(r) - r) / r**2,
        lambda r: r**2 / mpmath.exp(r), -half, half, 5)  # fmt: skip
    root = float(mpmath.sqrt(0.5))
    fit("log: (log1p(f) - f + f^2 / 2) / f^3", lambda f: (mpmath.log1p(f) - f + f * f / 2) / f**3,
        lambda f: f**3 / mpmath.log1p(f), root - 1.001, 2 * root - 0.999, 8)  # fmt: skip
    fit("tanh: (tanh(x) / x - 1) / z, z = x^2", lambda z: (mpmath.tanh(z**0.5) / z**0.5 - 1) / z,
        lambda z: z**1.5 / mpmath.tanh(z**0.5), 1e-6, 0.626**2, 5)  # fmt: skip
    fit("erf, small: erf(x) / x - 1, z = x^2", lambda z: mpmath.erf(z**0.5) / z**0.5 - 1,
        lambda z: z**0.5 / mpmath.erf(z**0.5), 1e-6, 0.926**2, 6)  # fmt: skip
    fit("erf, large: -log(erfc(t)) in t", lambda t: -mpmath.log(mpmath.erfc(t)),
        lambda t: mpmath.erfc(t), 0.92, 4.0, 8)  # fmt: skip


if __name__ == "__main__":
    main()
