"""Operations on arrays: the kernels without a model around them."""

from bitnet_ext.ops.attention import attention
from bitnet_ext.ops.attention_gradients import attention_backward
from bitnet_ext.ops.multi_head import MultiHeadAttention, MultiHeadGradients
from bitnet_ext.ops.norms import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward
from bitnet_ext.ops.rotary import rotary_embedding, rotary_embedding_backward
from bitnet_ext.ops.ternary import PackedTernary, ternary_linear, ternary_matmul

__all__ = [
    "MultiHeadAttention",
    "MultiHeadGradients",
    "PackedTernary",
    "attention",
    "attention_backward",
    "layer_norm",
    "layer_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rotary_embedding",
    "rotary_embedding_backward",
    "ternary_linear",
    "ternary_matmul",
]
