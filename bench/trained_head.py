"""Vocabulary tables and hidden states that meet as those of a trained model do.

A trained head has rows of spread norms, and one of them stands out at each hidden state: here at an
angle of cosine 0.4, which random rows of 2560 elements never come near.
"""

from __future__ import annotations

import dataclasses

import numpy as np

import bitnet_ext as bx
from bitnet_ext.model.batch import TokenBatch
from bitnet_ext.model.load import Table

COSINE = 0.4


def bf16_table(vocab: int, width: int, spread: bool) -> np.ndarray:
    """Normal rows, their norms spread or alike, as bits [V, E]."""
    rng = np.random.default_rng(1)
    table = np.empty((vocab, width), np.uint16)
    for low in range(0, vocab, 4096):
        block = rng.standard_normal((min(4096, vocab - low), width), np.float32)
        if spread:
            block *= np.exp(rng.normal(0, 0.25, (len(block), 1))).astype(np.float32)
        table[low : low + len(block)] = bf16(block)
    return table


def bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values).view(np.uint32) >> 16).astype(np.uint16)


def near(rows: np.ndarray) -> np.ndarray:
    """A vector of unit variance at COSINE to each of ``rows``, float32."""
    noise = np.random.default_rng(2).standard_normal(rows.shape, np.float32)
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True) * np.sqrt(rows.shape[1])
    return (COSINE * unit + np.sqrt(1 - COSINE**2) * noise).astype(np.float32)


def with_trained_head(
    model: bx.BitNetModel, tokens: np.ndarray, wanted: np.ndarray
) -> bx.BitNetModel:
    """The model with a table of its own for the head, which wants the ids ``wanted`` [B, n] after
    the last n of ``tokens`` [B, T]: all of them different."""
    config, engine = model.config, model._engine
    batch = TokenBatch.of(tokens, None, config.vocab_size)
    kept = np.full(len(wanted), wanted.shape[1], np.int32)
    hidden = engine.hidden_rows(batch, kept, 0)
    engine.final_norm(hidden)
    table = bf16_table(config.vocab_size, config.hidden_size, spread=True)
    table[wanted.reshape(-1)] = bf16(near(hidden))
    weights = dataclasses.replace(engine.weights, head=Table(table, "bf16"))
    untied = dataclasses.replace(config, tie_word_embeddings=False)
    return bx.BitNetModel(untied, weights)
