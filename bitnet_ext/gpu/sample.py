"""Tokens chosen on a device: those that the CPU chooses from the same logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.topk import BINS, BLOCK, DIGITS, STATE_BYTES, chunks

__all__ = ["Choice", "DeviceSampler"]

_MODULE = Module(
    "sample.cu", ["find_largest", "kth_largest_digit", "weigh", "nucleus_digit", "draw"]
)

_MOST_TOKENS = 1 << 20  # so that sums of weights fit 64 bits


@dataclass(frozen=True)
class Choice:
    """How tokens are chosen; as ``_sampling.sample``, or ``_sampling.argmax`` where ``greedy``."""

    greedy: bool
    penalty: float = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0


class DeviceSampler:
    """Chooses the next token of each of ``rows`` rows of ``vocab`` logits; allocates once.

    Raises:
        InvalidShapeError: more than 2^20 logits in a row.
    """

    def __init__(self, device: Device, rows: int, vocab: int, choice: Choice) -> None:
        if vocab > _MOST_TOKENS:
            raise InvalidShapeError(f"logits: found {vocab}, wanted at most {_MOST_TOKENS}")
        self._device = device
        self._choice = choice
        self._vocab = vocab
        self._grid = chunks(vocab), rows
        self._states = device.to_device(np.zeros((rows, STATE_BYTES), np.uint8))
        self._keys = device.empty((rows, chunks(vocab)), np.uint64)
        self._ids = device.empty((rows, chunks(vocab)), np.int32)
        if not choice.greedy:
            self._histograms = device.to_device(np.zeros((rows, BINS), np.uint64))
            self._weights = device.empty((rows, vocab), np.uint64)

    def choose(
        self, logits: Any, positions: Any, tokens: Any, seen: Any = None, active: Any = None
    ) -> None:
        """Write the token of each row, -1 where every logit is NaN or -inf, and mark it seen.

        Args:
            logits: float32 [rows, V].
            positions: int32 [rows], absolute positions of the tokens chosen.
            tokens: int32 [rows].
            seen: uint8 [rows, V], marks of the tokens that the penalty applies to, or None.
            active: uint8 [rows], 0 for rows to leave alone, or None.
        """
        c = self._choice
        common = [logits, seen, active, self._states, np.int32(self._vocab), np.float64(c.penalty)]
        greedy = tokens if c.greedy else None
        self._launch("find_largest", [*common, self._keys, self._ids, greedy])
        if c.greedy:
            return
        top_k = c.top_k if c.top_k < self._vocab else 0
        for digit in range(DIGITS) if top_k else ():
            args = [np.int32(top_k), np.int32(digit), self._histograms]
            self._launch("kth_largest_digit", [*common, *args])
        args = [np.float64(c.temperature), np.int32(top_k), self._weights]
        self._launch("weigh", [*common, *args])
        common = [active, self._states, np.int32(self._vocab), np.float64(c.top_p)]
        for digit in range(DIGITS) if c.top_p < 1 else ():
            args = [np.int32(digit), self._histograms]
            self._launch("nucleus_digit", [self._weights, *common, *args])
        args = [np.float64(c.min_p), np.uint64(c.seed), positions, self._keys, tokens]
        self._launch("draw", [self._weights, seen, *common, *args])

    def _launch(self, kernel: str, args: list[Any]) -> None:
        self._device.launch(_MODULE, kernel, self._grid, BLOCK, args)
