"""The weights of a transformer layer, as a checkpoint gives them.

``_core.Layer`` runs them; csrc/run/layer.h has the order of operations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core

__all__ = ["NO_NORM", "Layer", "Linear", "Norm"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Norm:
    """RMSNorm or LayerNorm; ``kind`` "none" passes its input through."""

    kind: Literal["rms", "layer", "none"]
    eps: float
    weight: Float32 | None = None
    bias: Float32 | None = None


NO_NORM = Norm("none", 0.0)


@dataclass(frozen=True)
class Linear:
    """A ternary linear layer, the norm of its input when it has one, and its bias."""

    weight: _core.PackedTernary
    bias: Float32 | None
    norm: Norm = NO_NORM


@dataclass(frozen=True)
class Layer:
    """The weights of one layer.

    ``qkv`` and ``gate_up`` read one input each and put their outputs side by side: a single matrix
    that holds all of them, unless every part has a norm of its own.
    """

    attn_norm: Norm
    qkv: tuple[Linear, ...]
    o: Linear
    ffn_norm: Norm
    gate_up: tuple[Linear, ...]
    down: Linear
