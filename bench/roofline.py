"""The least time a call on a model can take on this machine: work over measured peaks.

A call of many tokens is bound by arithmetic: ternary multiply-adds at the dot product's peak, then
attention and the vocabulary projection at the float peak (they do not overlap: one pool runs
them in turn).  A step is bound by whichever is slower, arithmetic or reading weights, K and V.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from limits import Limits

from bitnet_ext import BitNetConfig, estimate_memory


@dataclass(frozen=True)
class Work:
    """Multiply-adds and bytes of one call."""

    ternary_macs: float
    float_macs: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(
            self.ternary_macs + other.ternary_macs,
            self.float_macs + other.float_macs,
            self.bytes + other.bytes,
        )


@dataclass(frozen=True)
class Peaks:
    """What the machine did a moment ago, a second: multiply-adds and bytes."""

    ternary: float
    float: float
    read: float

    def seconds(self, work: Work) -> float:
        """The larger of arithmetic and reading."""
        arithmetic = work.ternary_macs / self.ternary + work.float_macs / self.float
        return max(arithmetic, work.bytes / self.read)


def measure_peaks(limits: Limits, isa: str, data: np.ndarray) -> Peaks:
    """All three, with every thread; ``data`` is read and exceeds the last-level cache."""
    ternary, multiply_add = limits.peak(isa), limits.fma_peak(isa)
    if ternary is None or multiply_add is None:
        raise SystemExit(f"no peak is known for the ISA {isa!r}")
    return Peaks(ternary, multiply_add, limits.read(data))


def layer_macs(config: BitNetConfig) -> tuple[int, int]:
    """Ternary multiply-adds of one token in one layer: all, and those of its K and V."""
    kv = 2 * config.hidden_size * config.kv_size
    attention = 2 * config.hidden_size * config.q_size + kv
    ffn = (2 + config.gated_ffn) * config.hidden_size * config.intermediate_size
    return attention + ffn, kv


def call_work(
    config: BitNetConfig, lengths: Sequence[int], past: int, logit_rows: int, head_bytes: float = 2
) -> Work:
    """One pass over new tokens, ``lengths`` of them in each sequence after ``past`` others.

    The last layer gives only K and V of tokens whose logits nobody wants.
    ``head_bytes``: of an element of the vocabulary table as it is read; K and V are float32.
    """
    tokens = sum(lengths)
    seen = sum(n * past + n * (n + 1) // 2 for n in lengths)  # (query, key) pairs a head
    last_seen = seen if logit_rows == tokens else sum(past + n for n in lengths)
    layer, kv_macs = layer_macs(config)
    layers = config.num_layers - 1
    table = config.vocab_size * config.hidden_size
    pair_macs = 2 * config.head_dim * config.num_heads
    kv = 4 * 2 * config.kv_size * config.num_layers * sum(past + n for n in lengths)
    return Work(
        ternary_macs=tokens * (layers * layer + kv_macs) + logit_rows * (layer - kv_macs),
        float_macs=(layers * seen + last_seen) * pair_macs + logit_rows * table,
        bytes=packed_bytes(config) + (head_bytes * table if logit_rows else 0) + kv,
    )


# Of an element of the vocabulary table: stored as bf16, and what the screen needs where no logit
# stands out, or one does.
HEAD_BYTES = {"tg": 2, "gr": 0.75, "gc": 0.5}
STEPS = 16  # of decode in a run of bench_model.py


def parse_test(name: str) -> tuple[str, int, int]:
    """(kind, length or context, batch) of a test of bench_model.py: tg512x4."""
    match = re.fullmatch(r"(pp|ft|sc|tg|gr|gc)(\d+)(?:x(\d+))?", name)
    if match is None:
        raise SystemExit(f"test: found {name!r}, wanted one of ppN ftN scN tgC grC gcC, or with xB")
    return match[1], int(match[2]), int(match[3] or 1)


def test_work(config: BitNetConfig, name: str) -> Work:
    """What one run of the test multiplies and reads."""
    kind, length, batch = parse_test(name)
    if kind == "pp":
        return call_work(config, [length] * batch, 0, batch)
    if kind in ("ft", "sc"):
        return call_work(config, [length] * batch, 0, batch * length)
    # Each step reads everything once, so that the sum of bounds is the bound of the sum.
    work = Work(0, 0, 0)
    for past in range(length, length + STEPS):
        work += call_work(config, [1] * batch, past, batch, HEAD_BYTES[kind])
    return work


def packed_bytes(config: BitNetConfig) -> int:
    """Bytes of the packed ternary weights."""
    table = 2 * config.vocab_size * config.hidden_size
    tables = 1 if config.tie_word_embeddings else 2
    return estimate_memory(config, 1, 1).weights - tables * table
