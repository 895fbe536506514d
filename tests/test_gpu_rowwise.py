"""Norms and rotary embedding of arrays on a device: the CPU's bits."""

import numpy as np
import pytest
from attention_cases import same_bits

import bitnet_ext as bx
from bitnet_ext import ops
from bitnet_ext.errors import InvalidShapeError

SHAPES = [((7,), -1), ((1, 1), -1), ((3, 17), 1), ((2, 3, 5), 1), ((2, 3, 5), -3), ((4, 560), -1)]
EMPTY = [((0, 4), -1), ((3, 0), -1), ((0, 0), 0), ((2, 0, 3), 1)]


def normal(seed, *shape, dtype=np.float32):
    return np.random.default_rng(seed).normal(0.3, 2, shape).astype(dtype)


def same(device, call, *arrays):
    """``call`` of the arrays on the device gives the bits that it gives on the host."""
    with np.errstate(all="ignore"):
        wanted = call(*arrays)
    found = call(*(a if a is None else device.to_device(a) for a in arrays))
    wanted, found = (x if isinstance(x, tuple) else (x,) for x in (wanted, found))
    assert all(device.owns(array) for array in found)
    host = [device.to_host(array) for array in found]
    assert [a.dtype for a in host] == [a.dtype for a in wanted]
    assert same_bits(host, wanted)


@pytest.mark.parametrize(("shape", "axis"), SHAPES + EMPTY)
def test_norms(device, shape, axis):
    x, weight, bias = normal(1, *shape), normal(2, *shape[axis:]), normal(3, *shape[axis:])
    same(device, lambda x, w: bx.rms_norm(x, w, eps=1e-6, axis=axis), x, weight)
    same(device, lambda x, w, b: bx.layer_norm(x, w, b, axis=axis), x, weight, bias)
    statistics = {"axis": axis, "return_stats": True}
    same(device, lambda x: bx.layer_norm(x, None, **statistics), x)
    same(device, lambda x: bx.rms_norm(x, None, axis=axis), x)


def test_rows_that_shared_memory_does_not_hold(device):
    width = device.block_memory // 4 + 7
    x, weight = normal(7, 2, width), normal(8, width)
    same(device, lambda x, w: bx.rms_norm(x, w), x, weight)
    same(device, lambda x, w: bx.layer_norm(x, w, w), x, weight)


def test_rows_that_are_not_finite_or_subnormal(device):
    x = normal(4, 5, 40)
    x[0, 3], x[1, 7], x[2], x[3] = np.nan, np.inf, 1e30, x[3] * 1e-42
    for eps in (1e-5, 0.0):
        same(device, lambda x, eps=eps: bx.rms_norm(x, None, eps=eps), x)
        same(device, lambda x, eps=eps: bx.layer_norm(x, None, eps=eps, return_stats=True), x)


def test_half_and_any_strides(device):
    x, weight = normal(5, 6, 10, 40, dtype=np.float16), normal(6, 40, dtype=np.float16)
    same(device, bx.rms_norm, x, weight)
    same(device, lambda x: bx.layer_norm(x[::2, 1:8, 5:30].transpose(0, 2, 1), None), x)
    same(device, lambda x: bx.rms_norm(x[..., ::3], None), x)
    assert same_bits(
        [device.to_host(bx.rms_norm(device.to_device(x), weight))], [bx.rms_norm(x, weight)]
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 4])
def test_rotary_embedding(device, interleaved, rotary_dim):
    options = {"interleaved": interleaved, "rotary_dim": rotary_dim}
    half = (rotary_dim or 10) // 2
    cos, sin, ids = normal(7, 9, half), normal(8, 9, half), np.array([[8, 0, 3], [1, 1, 2]])
    for dtype in (np.float32, np.float16):
        x = normal(9, 2, 4, 3, 10, dtype=dtype)
        flat = normal(10, 2, 3, 40, dtype=dtype)

        def by_id(x, cos, sin, ids):
            return bx.rotary_embedding(x, cos, sin, position_ids=ids, **options)

        def by_place(x, cos, sin):
            return bx.rotary_embedding(x, cos, sin, num_heads=4, **options)

        same(device, by_id, x, cos, sin, ids)
        same(device, by_id, x, cos, sin, ids.astype(np.int32))
        same(device, by_place, flat, normal(11, 2, 3, half), normal(12, 2, 3, half))
        same(device, lambda x: by_id(x[:, ::-1, :, :], cos, sin, ids), x)


def test_ids_without_a_row_show(device):
    x, cos = normal(13, 1, 1, 3, 4), normal(14, 5, 2)
    ids = device.to_device(np.array([[0, 5, -1]]))
    y = bx.rotary_embedding(*(device.to_device(a) for a in (x, cos, cos)), position_ids=ids)
    assert np.isnan(device.to_host(y)).all((0, 1, 3)).tolist() == [False, True, True]


def test_what_does_not_fit(device):
    x = device.to_device(normal(15, 3, 4))
    with pytest.raises(InvalidShapeError, match="weight: found"):
        bx.rms_norm(x, np.ones(3, np.float32))
    with pytest.raises(InvalidShapeError, match="x: found int64"):
        bx.rms_norm(device.to_device(np.arange(3)), None)
    with pytest.raises(InvalidShapeError, match="found it on a CUDA device, wanted it on"):
        bx.rms_norm(np.ones(4, np.float32), x[0])
    with pytest.raises(InvalidShapeError, match="grad: found"):
        ops.rms_norm_backward(x[:2], x, None)


# --- gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "axis"), [*SHAPES, *EMPTY, ((64, 3), -1), ((65, 300), -1), ((200, 5), -1)]
)
def test_gradients_of_norms(device, shape, axis):
    grad, x, weight = normal(1, *shape), normal(2, *shape), normal(3, *shape[axis:])
    for backward in (ops.rms_norm_backward, ops.layer_norm_backward):
        same(device, lambda g, x, w, f=backward: f(g, x, w, eps=1e-6, axis=axis), grad, x, weight)
        same(device, lambda g, x, f=backward: f(g, x, None, axis=axis), grad, x)


def test_gradients_of_half_strided_and_odd_rows(device):
    grad, x = normal(4, 6, 10, 40), normal(5, 6, 10, 40)
    half = grad.astype(np.float16), x.astype(np.float16)
    odd = x[0].copy()
    odd[0, 3], odd[1, 7], odd[2], odd[3], odd[4] = np.nan, np.inf, 1e30, odd[3] * 1e-42, 0.0
    for backward in (ops.rms_norm_backward, ops.layer_norm_backward):
        same(device, lambda g, x, f=backward: f(g, x, None), *half)
        same(
            device,
            lambda g, x, f=backward: f(g[:, 1:8, ::2], x[:, :7, 3:23], None, axis=1),
            grad,
            x,
        )
        same(device, lambda g, x, f=backward: f(g, x, None, eps=0.0), grad[0], odd)
        same(device, lambda g, x, f=backward: f(g, x, None), odd, grad[0])


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradient_of_rotary_embedding(device, interleaved):
    cos, sin, ids = normal(7, 9, 2), normal(8, 9, 2), np.array([[8, 0, 3], [1, 1, 2]])
    sin[0] = 0.0
    for dtype in (np.float32, np.float16):
        grad = normal(9, 2, 4, 3, 10, dtype=dtype)

        def turned_back(grad, cos, sin, ids):
            return ops.rotary_embedding_backward(
                grad, cos, sin, position_ids=ids, interleaved=interleaved, rotary_dim=4
            )

        same(device, turned_back, grad, cos, sin, ids)
