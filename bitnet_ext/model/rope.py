"""Rotary position tables, as the checkpoints' reference code computes them in float32.

RoPE: Su et al. 2021, arXiv:2104.09864. The angle is float32(position) * float32(inv_freq), rounded
to float32: at long contexts that rounding is part of what a model was trained with.
"""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig

__all__ = ["RopeTables", "inverse_frequencies"]

Float32 = npt.NDArray[np.float32]


def inverse_frequencies(config: BitNetConfig) -> Float32:
    """``theta^(-2i/d)`` for i < d/2, rescaled for long contexts; float32 [head_dim / 2]."""
    half = np.arange(0, config.head_dim, 2, dtype=np.float32) / np.float32(config.head_dim)
    freq = (1.0 / np.power(float(config.rope_theta), half.astype(np.float64))).astype(np.float32)
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling.kind == "linear":
        return (freq / np.float32(scaling.factor)).astype(np.float32)
    # Llama 3.1: long waves are slowed by `factor`, short ones kept, the ones between blended.
    wavelength = 2 * np.pi / freq.astype(np.float64)
    context = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    blend = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    scaled = (1 - blend) * freq / scaling.factor + blend * freq
    return scaled.astype(np.float32)


class RopeTables:
    """cos and sin [P, head_dim / 2], made longer when a call needs more positions."""

    def __init__(self, config: BitNetConfig) -> None:
        self._inv_freq = inverse_frequencies(config)
        self._limit = config.max_position_embeddings
        self._lock = threading.Lock()
        self._tables: tuple[Float32, Float32] | None = None

    def upto(self, positions: int) -> tuple[Float32, Float32]:
        """Tables of at least ``positions`` rows."""
        tables = self._tables
        if tables is None or len(tables[0]) < positions:
            with self._lock:
                size = min(max(256, 1 << (positions - 1).bit_length()), self._limit)
                tables = self._tables = _core.rope_table(self._inv_freq, max(size, positions))
        return tables
