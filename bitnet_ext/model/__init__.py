"""The model: full forward, chunked prefill and decode over packed ternary weights."""

from bitnet_ext.model.load import RandomWeights, Weights, load_weights
from bitnet_ext.model.transformer import Transformer

__all__ = ["RandomWeights", "Transformer", "Weights", "load_weights"]
