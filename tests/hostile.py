"""Load a checkpoint as far as it goes, and hold a refusal to its promises."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from bitnet_ext.checkpoint import Checkpoint, open_checkpoint
from bitnet_ext.errors import CheckpointError
from bitnet_ext.generate.tokenizer import Tokenizer
from bitnet_ext.model.load import load_weights

MEMORY = 24 << 20  # what Python may hold while it reads a file of a few hundred KiB


def load_fully(path: str | Path, *, tokenizer: bool = False, **options: Any) -> Checkpoint:
    """Open, read every tensor, pack the ternary ones; build the tokenizer when asked."""
    checkpoint = open_checkpoint(path, **options)
    load_weights(checkpoint)
    if tokenizer:
        Tokenizer.from_checkpoint(checkpoint)
    return checkpoint


def refused(path: str | Path, match: str, **options: Any) -> None:
    """Loading raises CheckpointError, names the thing, and allocates little on the way."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            load_fully(path, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert re.search(match, message), message
    assert len(message) < 2000, len(message)
    assert peak < MEMORY, peak
