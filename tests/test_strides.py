"""Every op on arrays whose elements are anywhere: the bits of a contiguous copy."""

import numpy as np
import pytest
from attention_op_cases import field
from multi_head_cases import module, tables

import bitnet_ext as bx
from bitnet_ext.ops import norms, rotary


def whole_steps_apart(x):
    """A field whose rows are a multiple of its elements apart, none of them on a boundary."""
    return field(x, 1, 2 * x.itemsize - 1)


def off_its_boundary(x):
    memory = np.zeros(x.nbytes + 1, np.uint8)
    moved = np.ndarray(x.shape, x.dtype, memory, 1)
    moved[...] = x
    return moved


def backwards(x):
    return np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :]


def normal(*shape):
    return np.random.default_rng(shape).standard_normal(shape).astype(np.float32)


Q, K, V, MASK = normal(2, 4, 13, 16), normal(2, 2, 20, 16), normal(2, 2, 20, 16), normal(13, 20)
ANGLES = normal(2, 13, 8)
ROWS, VECTOR = normal(13, 32), normal(1, 16)
HALF = [x.astype(np.float16) for x in (Q, K, V)]
CODES = np.arange(13 * 32, dtype=np.int8).reshape(13, 32)
WEIGHT = bx.PackedTernary.pack(np.resize([1, 0, -1, 1, -1], (64, 32)).astype(np.int8), 0.5)
MHA, _ = module()
CALLS = {
    "attention": lambda at: bx.attention(at(Q), at(K), at(V)),
    "attention-half": lambda at: bx.attention(*map(at, HALF)),
    "attention-int8": lambda at: bx.attention(at(Q), at(K), at(V), precision="int8"),
    "attention-mask": lambda at: bx.attention(Q, K, V, mask=at(MASK)),
    "attention-half-mask": lambda at: bx.attention(Q, K, V, mask=at(MASK.astype(np.float16))),
    "attention-lengths": lambda at: bx.attention(Q, K, V, kv_lengths=at(np.array([[13, 15]]))[0]),
    "attention-backward": lambda at: bx.attention_backward(*map(at, (Q, Q, K, V)), mask=at(MASK)),
    "multi-head": lambda at: MHA(
        at(normal(2, 13, 32)), at(normal(2, 20, 32)), mask=at(MASK), rope=map(at, tables(20, 4))
    ),
    "rms-norm": lambda at: bx.rms_norm(at(Q), at(VECTOR)[0]),
    "rms-norm-axes": lambda at: bx.rms_norm(at(Q), at(Q[0, 0]), axis=-2),
    "layer-norm": lambda at: bx.layer_norm(at(Q), at(VECTOR)[0], at(VECTOR)[0], return_stats=True),
    "rms-norm-backward": lambda at: norms.rms_norm_backward(at(Q), at(Q), at(VECTOR)[0]),
    "layer-norm-backward": lambda at: norms.layer_norm_backward(at(Q), at(Q), at(VECTOR)[0]),
    "rotary": lambda at: bx.rotary_embedding(at(Q), at(ANGLES), at(ANGLES)),
    "rotary-flat": lambda at: bx.rotary_embedding(
        at(Q[0]), *map(at, (Q[0, ..., :2],) * 2), num_heads=4
    ),
    "rotary-backward": lambda at: rotary.rotary_embedding_backward(at(Q), at(ANGLES), at(ANGLES)),
    "ternary-linear": lambda at: bx.ternary_linear(at(ROWS), WEIGHT, at(normal(1, 64))[0]),
    "ternary-matmul": lambda at: bx.ternary_matmul(at(CODES), WEIGHT),
}


@pytest.mark.parametrize("at", [field, whole_steps_apart, off_its_boundary, backwards])
@pytest.mark.parametrize("call", CALLS)
def test_the_bits_of_a_copy(call, at):
    found, wanted = CALLS[call](at), CALLS[call](np.array)
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def test_fields_are_what_the_kernels_cannot_read():
    assert field(Q).strides[-2] % 4
    assert not whole_steps_apart(Q).flags.aligned
    assert whole_steps_apart(Q).strides[-2] % 4 == 0
