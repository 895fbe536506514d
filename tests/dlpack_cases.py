"""A call of every op on arrays of the caller's making."""

import numpy as np

import bitnet_ext as bx
from bitnet_ext.ops.attention_gradients import attention_backward
from bitnet_ext.ops.norms import layer_norm_backward, rms_norm_backward
from bitnet_ext.ops.rotary import rotary_embedding_backward


def unchanged(array):
    return array


def calls(of):
    """Name, and a call of each op with arrays made by ``of`` of NumPy's."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return of(rng.standard_normal(shape, np.float32))

    q, kv, d_out = normal(2, 4, 3, 8), normal(2, 2, 5, 8), normal(2, 4, 3, 8)
    half = of(rng.standard_normal((2, 4, 3, 8)).astype(np.float16))
    mask, lengths = of(rng.random((3, 5)) < 0.7), of(np.array([5, 4]))
    x, row, bias = normal(2, 3, 8), normal(8), normal(6)
    cos, sin, ids = normal(9, 4), normal(9, 4), of(rng.integers(0, 9, (2, 3)))
    codes = of(rng.integers(-128, 128, (5, 8), np.int8))
    weight = bx.PackedTernary.pack(rng.integers(-1, 2, (6, 8), np.int8), 1.0, bits="2")
    rope = {"position_ids": ids}

    def multi_head(training=False):
        mha = bx.MultiHeadAttention(8, 2)
        state = np.random.default_rng(1)
        shapes = {"w_q": (2, 4, 8), "w_k": (2, 4, 8), "w_v": (2, 4, 8), "w_out": (2, 4, 8)}
        mha.load_state_dict(
            {n: of(state.standard_normal(s, np.float32)) for n, s in shapes.items()}
        )
        tables = of(np.cos(np.ones((9, 2), np.float32))), of(np.sin(np.ones((9, 2), np.float32)))
        some = of(np.tri(3, 3, dtype=bool))
        y = mha(x, x, mask=some, rope=tables, training=training)
        if not training:
            return y
        found = mha.backward(normal(2, 3, 8))
        return y, found.x, found.x_kv, *found.weights.values()

    return {
        "ternary_matmul": lambda: bx.ternary_matmul(codes, weight),
        "ternary_linear": lambda: bx.ternary_linear(x, weight, bias),
        "attention": lambda: bx.attention(q, kv, kv, mask=mask, kv_lengths=lengths),
        "attention, half": lambda: bx.attention(half, half, half),
        "attention, scores": lambda: bx.attention(
            q, kv, kv, dropout_p=0.3, seed=lengths, return_scores="raw"
        ),
        "attention_backward": lambda: attention_backward(d_out, q, kv, kv, mask=mask),
        "MultiHeadAttention": multi_head,
        "MultiHeadAttention.backward": lambda: multi_head(training=True),
        "rms_norm": lambda: bx.rms_norm(x, row),
        "layer_norm": lambda: bx.layer_norm(x, row, row),
        "layer_norm, statistics": lambda: bx.layer_norm(x, None, return_stats=True),
        "rms_norm_backward": lambda: rms_norm_backward(x, x, row),
        "layer_norm_backward": lambda: layer_norm_backward(x, x, row),
        "rotary_embedding": lambda: bx.rotary_embedding(q, cos, sin, **rope),
        "rotary_embedding_backward": lambda: rotary_embedding_backward(d_out, cos, sin, **rope),
    }


def each(found):
    return found if isinstance(found, tuple) else (found,)
