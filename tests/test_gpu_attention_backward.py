"""bx.attention_backward of arrays on a device: every option, the CPU's bits."""

import numpy as np
import pytest
from attention_cases import same_bits
from attention_op_cases import OPTIONS, TK, TQ, B, normal, operands, pairs, problem

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError

DIFFERENTIABLE = {
    name: option
    for name, option in OPTIONS.items()
    if not option.keys() & {"precision", "return_scores"}
}


def gradient_of_out(q, v, seed=5):
    return normal(*q.shape[:-1], v.shape[-1], seed=seed).astype(q.dtype)


def check(device, d_out, q, k, v, **options):
    """The gradients on the device have the bits of those on the host; returns them."""
    with np.errstate(invalid="ignore"):
        wanted = bx.attention_backward(d_out, q, k, v, **options)
    found = bx.attention_backward(*map(device.to_device, (d_out, q, k, v)), **options)
    assert all(device.owns(array) for array in found)
    host = [device.to_host(array) for array in found]
    assert [a.dtype for a in host] == [a.dtype for a in (q, k, v)]
    assert same_bits(host, wanted), options
    return host


@pytest.mark.parametrize("option", DIFFERENTIABLE)
def test_every_option(device, option):
    (q, k, v), options = problem(OPTIONS[option])
    check(device, gradient_of_out(q, v), q, k, v, **options)


def test_every_pair_of_options(device):
    for a, b in pairs(DIFFERENTIABLE):
        (q, k, v), options = problem(OPTIONS[a] | OPTIONS[b])
        check(device, gradient_of_out(q, v), q, k, v, **options)


@pytest.mark.parametrize("sizes", [(1, 1), (2, 17), (64, 64), (65, 3), (3, 130), (140, 2)], ids=str)
def test_every_width(device, sizes):
    q, k, v = operands(1, 2, 1, 9, 70, *sizes)
    check(device, gradient_of_out(q, v), q, k, v, causal=True, past_len=40)


@pytest.mark.parametrize("lengths", [(1, 1), (5, 64), (33, 65), (70, 8), (70, 200)], ids=str)
def test_every_length(device, lengths):
    q, k, v = operands(1, 4, 2, *lengths, 5, 6)
    d_out = gradient_of_out(q, v)
    check(device, d_out, q, k, v, window=(30, 3), past_len=10)
    check(device, d_out, q, k, v, causal=True, dropout_p=0.3, seed=4)


@pytest.mark.parametrize("size", ["b", "tq", "tk", "dv"])
def test_empty_sizes(device, size):
    q, k, v = operands(**{size: 0})
    check(device, gradient_of_out(q, v), q, k, v, causal=True)


def test_half_types(device):
    arrays = operands(dtype=np.float16)
    check(device, gradient_of_out(arrays[0], arrays[2]), *arrays)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = operands(dtype=ml_dtypes.bfloat16)
    check(device, gradient_of_out(arrays[0], arrays[2]), *arrays, softcap=2.0)


def test_any_leading_axes_and_strides(device):
    q, k, v = operands(6, 4, 2, 5, 20, 6, 9)
    d_out = gradient_of_out(q, v)
    for lead in ((2, 3), (1, 6)):
        check(device, *(x.reshape(lead + x.shape[1:]) for x in (d_out, q, k, v)))
    wanted = bx.attention_backward(d_out, q, k, v)
    views = [
        device.to_device(np.ascontiguousarray(x.swapaxes(1, 2))).swapaxes(1, 2)
        for x in (d_out, q, k, v)
    ]
    found = bx.attention_backward(*views)
    assert same_bits([device.to_host(a) for a in found], wanted)


def test_operands_that_are_broadcast(device):
    q, k, v = operands(6, 4, 2, 5, 20, 6, 9)
    d_out = gradient_of_out(q, v)
    check(device, d_out, q, k[:1], v[0])
    split = [x.reshape(2, 3, *x.shape[1:]) for x in (d_out, q, k, v)]
    check(device, split[0], split[1], split[2][:, :1], split[3][:1])
    check(device, split[0][:1, :0], split[1][:1, :0], split[2][0, :1], split[3][0, :1])


def test_values_that_are_not_finite_stay_where_they_are_seen(device):
    q, k, v = operands()
    d_out = gradient_of_out(q, v)
    k[:, :, 5], v[:, :, 6], v[:, :, 30] = np.nan, np.inf, np.nan
    q[0, 1, 2], d_out[1, 2, 3, 0] = np.inf, np.nan
    hidden = np.ones(TK, bool)
    hidden[[5, 6]] = False
    check(device, d_out, q, k, v, mask=hidden, kv_lengths=[min(30, TK)] * B)
    dq, dk, dv = check(device, d_out, q, k, v, mask=np.zeros((TQ, TK), bool))
    assert not any(a.any() for a in (dq, dk, dv))


def test_what_does_not_fit(device):
    q, k, v = operands()
    d_out = gradient_of_out(q, v)
    arrays = list(map(device.to_device, (q, k, v)))
    with pytest.raises(InvalidShapeError, match="d_out: found it on the host"):
        bx.attention_backward(d_out, *arrays)
    with pytest.raises(InvalidShapeError, match="d_out: found"):
        bx.attention_backward(device.to_device(d_out[:, :, :1]), *arrays)
    wide = device.to_device(np.zeros((1, 1, 1, 1025), np.float32))
    with pytest.raises(InvalidShapeError, match="head sizes 1025"):
        bx.attention_backward(wide, wide, wide, wide)
