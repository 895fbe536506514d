"""Operations on arrays: the kernels without a model around them."""

from bitnet_ext.ops.ternary import PackedTernary, ternary_linear, ternary_matmul

__all__ = ["PackedTernary", "ternary_linear", "ternary_matmul"]
