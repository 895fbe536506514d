"""The checkpoints whose logits stock transformers has computed, and a spy on our quantiser.

Shared by tools/make_goldens.py, which asks transformers, and test_goldens.py, which compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from layer_by_ops import LayerByOps
from make_checkpoints import Made, make_hf

from bitnet_ext import BitNetModel

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = 20
TOKENS = 4  # float32 flips an activation in about 100,000: more tokens, fewer exact seeds
VOCAB = 64

_BITLINEAR = {"quant_method": "bitnet", "linear_class": "bitlinear"}
_NORMS_INSIDE = _BITLINEAR | {"use_rms_norm": True, "rms_norm_eps": 1e-6}
# Within four positions of a context of 16: a wave that is kept, three blended, the rest slowed.
_LLAMA3_ROPE = {
    "factor": 8.0,
    "high_freq_factor": 2.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10.0,
    "rope_type": "llama3",
}
# name -> family of make_checkpoints, and the keys of config.json laid over it; "spread" is
# make_hf's, wide enough for the layers to outweigh the embedding.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bitnet-offline": ("bitnet", {}),
    "bitnet-divide": ("bitnet", {"quantization_config": _BITLINEAR, "tie_word_embeddings": False}),
    "bitnet-online": ("bitnet-bf16", {}),
    "1bitllm": ("1bitllm", {}),
    "llama3": ("llama3", {}),
    "falcon3": ("falcon3", {}),
    "falcon-e": ("falcon-e", {}),
    "llama-rms": ("llama-rms", {}),
    "gpt2": ("gpt2", {"scale_rule": "divide"}),
    "bitnet-wide": ("bitnet", {"spread": 0.1}),
    "llama-norms-wide": ("llama3", {"quantization_config": _NORMS_INSIDE, "spread": 0.1}),
    "llama-rope-wide": (
        "llama3",
        {"rope_parameters": _LLAMA3_ROPE, "rope_theta": None, "spread": 0.1},
    ),
}


def make_case(name: str, seed: int, directory: Path) -> Made:
    """Write the checkpoint of a case."""
    family, changes = CASES[name]
    return make_hf(directory, family, seed=seed, vocab_size=VOCAB, tokenizer=False, **changes)


def case_ids(seed: int) -> list[int]:
    """The tokens fed to the checkpoint of a seed."""
    return np.random.RandomState(1000 + seed).randint(0, VOCAB, TOKENS).tolist()


DEMO_TOKENS = 3
DEMO_COLUMNS = slice(None, None, 8)  # of the demo's vocabulary: enough to see, small to keep


def demo_ids(seed: int) -> list[int]:
    """Real tokens: a piece of this file's own Python text."""
    tokens = BitNetModel.from_pretrained("demo").tokenizer.encode(_DEMO_TEXT)
    return tokens[seed * DEMO_TOKENS :][:DEMO_TOKENS]


_DEMO_TEXT = """
def read_config(path, *, encoding="utf-8"):
    \"\"\"Return the options of a configuration file as a dictionary.\"\"\"
    options = {}
    with open(path, encoding=encoding) as file:
        for number, line in enumerate(file, start=1):
            name, separator, value = line.partition("=")
            if not separator:
                raise ValueError(f"{path}:{number}: expected name = value")
            options[name.strip()] = value.strip()
    return options


class Reader:
    def __init__(self, source):
        self.source = source
        self.closed = False
"""


@contextmanager
def quantised_inputs(model: BitNetModel) -> Iterator[list[np.ndarray]]:
    """Collect the int8 input of every linear layer, in the order of the computation."""
    seen: list[np.ndarray] = []
    engine = model._engine
    layers = engine.layers
    engine.layers = [LayerByOps(layer, model.config, seen) for layer in engine.weights.layers]
    try:
        yield seen
    finally:
        engine.layers = layers
