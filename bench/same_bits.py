"""What a bench of a model checks before it times anything."""

from __future__ import annotations

import numpy as np

import bitnet_ext as bx


def check_model(model: bx.BitNetModel) -> None:
    """Every way to the logits of a token gives the same bits."""
    ids = np.random.default_rng(1).integers(0, model.config.vocab_size, 70)
    full = model.forward_full(ids)
    np.testing.assert_array_equal(model.forward_full(ids, logits_to_keep=1), full[-1:])
    cache = model.new_cache()
    np.testing.assert_array_equal(model.prefill(ids[:-1], cache, chunk_size=13), full[-2])
    np.testing.assert_array_equal(model.decode(ids[-1:], cache)[0], full[-1])
