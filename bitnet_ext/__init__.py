"""Run and score ternary (BitNet b1.58) transformers.

import bitnet_ext as bx
model = bx.BitNetModel.from_pretrained("demo")
print(model.generate("def read_json(path):\\n"))
"""

from bitnet_ext import errors
from bitnet_ext._core import __version__
from bitnet_ext.api import BitNetModel
from bitnet_ext.config import BitNetConfig, RopeScaling
from bitnet_ext.generate import GenerationChunk, GenerationConfig, GenerationOutput
from bitnet_ext.masks import (
    MaskCache,
    create_batch_causal_mask,
    create_causal_mask,
    iter_causal_mask,
)
from bitnet_ext.memory import (
    MemoryEstimate,
    MemoryStats,
    estimate_memory,
    memory_stats,
    reset_peak_memory,
    set_memory_limit,
)
from bitnet_ext.ops import (
    MultiHeadAttention,
    MultiHeadGradients,
    PackedTernary,
    attention,
    attention_backward,
    layer_norm,
    rms_norm,
    rotary_embedding,
    ternary_linear,
    ternary_matmul,
)
from bitnet_ext.runtime import (
    DispatchMetrics,
    available_isas,
    dispatch_info,
    get_isa,
    get_num_threads,
    set_isa,
    set_num_threads,
    show_config,
)
from bitnet_ext.score import Score

__all__ = [
    "BitNetConfig",
    "BitNetModel",
    "DispatchMetrics",
    "GenerationChunk",
    "GenerationConfig",
    "GenerationOutput",
    "MaskCache",
    "MemoryEstimate",
    "MemoryStats",
    "MultiHeadAttention",
    "MultiHeadGradients",
    "PackedTernary",
    "RopeScaling",
    "Score",
    "__version__",
    "attention",
    "attention_backward",
    "available_isas",
    "create_batch_causal_mask",
    "create_causal_mask",
    "dispatch_info",
    "errors",
    "estimate_memory",
    "get_isa",
    "get_num_threads",
    "iter_causal_mask",
    "layer_norm",
    "memory_stats",
    "reset_peak_memory",
    "rms_norm",
    "rotary_embedding",
    "set_isa",
    "set_memory_limit",
    "set_num_threads",
    "show_config",
    "ternary_linear",
    "ternary_matmul",
]
