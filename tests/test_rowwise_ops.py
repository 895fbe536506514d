"""bx.rms_norm, bx.layer_norm, bx.rotary_embedding and their gradients against float64; equal bits
on every ISA and any number of threads."""

import math

import numpy as np
import pytest
import reference
from everywhere import everywhere

import bitnet_ext as bx
from bitnet_ext import _core, ops
from bitnet_ext.errors import InvalidShapeError

SHAPES = [((7,), -1), ((1, 1), -1), ((3, 17), 1), ((2, 3, 5), 1), ((2, 3, 5), -3), ((4, 2560), -1)]
EMPTY = [((0, 4), -1), ((3, 0), -1), ((0, 0), 0), ((2, 0, 3), 1)]


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(0.3, 2, shape).astype(np.float32)


def parameters(shape):
    rng = np.random.default_rng(5)
    weight, bias = rng.uniform(0.5, 1.5, shape), rng.normal(0, 0.3, shape)
    return weight.astype(np.float32), bias.astype(np.float32)


# --- norms ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_norms(shape, axis):
    x = normal(1, *shape)
    weight, bias = parameters(shape[axis:])
    (y,) = everywhere("norm", lambda: (bx.rms_norm(x, weight, eps=1e-6, axis=axis),))
    want = reference.norm_over(x, weight, eps=1e-6, axis=axis)
    assert (y.shape, y.dtype) == (shape, np.float32)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=1e-6)
    (y,) = everywhere("norm", lambda: (bx.layer_norm(x, weight, bias, axis=axis),))
    want = reference.norm_over(x, weight, bias, kind="layer", axis=axis)
    np.testing.assert_allclose(y, want, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_layer_norm_statistics(shape, axis):
    x = normal(2, *shape)
    y, mean, inv_std = everywhere(
        "norm", lambda: bx.layer_norm(x, None, eps=1e-3, axis=axis, return_stats=True)
    )
    assert np.array_equal(y, bx.layer_norm(x, None, eps=1e-3, axis=axis))
    axes = tuple(range(axis % x.ndim, x.ndim))
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axes, keepdims=True), rtol=1e-6, atol=1e-6)
    want = 1 / np.sqrt(exact.var(axes, keepdims=True) + 1e-3)
    np.testing.assert_allclose(inv_std, want, rtol=1e-6)


@pytest.mark.parametrize(("shape", "axis"), EMPTY)
def test_norms_of_nothing(shape, axis):
    x = np.zeros(shape, np.float32)
    rest = np.zeros(shape[axis:], np.float32)
    assert bx.rms_norm(x, rest, axis=axis).shape == shape
    y, mean, inv_std = bx.layer_norm(x, rest, rest, axis=axis, return_stats=True)
    stats = shape[:axis] + (1,) * rest.ndim
    assert (y.shape, mean.shape, inv_std.shape) == (shape, stats, stats)
    grads = ops.layer_norm_backward(x, x, rest, axis=axis)
    assert [g.shape for g in grads] == [shape, rest.shape, rest.shape]
    assert not any(g.any() for g in grads)


def test_norms_of_any_strides(isa):
    wide = normal(3, 6, 10, 40)
    for view in (
        wide[::2, 1:8, 5:30],
        wide.transpose(2, 0, 1),
        wide[::-1, :, ::-1],
        np.broadcast_to(wide[0, 0], (3, 40)),
    ):
        plain = view.copy()
        assert np.array_equal(bx.rms_norm(view, None), bx.rms_norm(plain, None))
        assert np.array_equal(
            bx.layer_norm(view, None, axis=-2), bx.layer_norm(plain, None, axis=-2)
        )
    weight = normal(4, 20)[::2]
    x = normal(5, 3, 10)
    assert np.array_equal(bx.rms_norm(x, weight), bx.rms_norm(x, weight.copy()))


def test_float16_is_rounded_once():
    x, weight = normal(6, 5, 33).astype(np.float16), normal(7, 33).astype(np.float16)
    wide = x.astype(np.float32)
    for y, want in (
        (bx.rms_norm(x, weight), bx.rms_norm(wide, weight.astype(np.float32))),
        (bx.layer_norm(x, weight, weight), bx.layer_norm(wide, *[weight.astype(np.float32)] * 2)),
    ):
        assert y.dtype == np.float16
        assert np.array_equal(y, want.astype(np.float16))
    grad_x, grad_weight = ops.rms_norm_backward(x, x, weight)
    assert (grad_x.dtype, grad_weight.dtype) == (np.float16, np.float32)


def test_nan_stays_in_its_row():
    x = normal(8, 4, 19)
    x[1, 18], x[2, 0] = np.nan, np.inf
    (y,) = everywhere("norm", lambda: (bx.layer_norm(x, None),))
    assert np.isnan(y[1:3]).all()
    kept = [0, 3]
    assert np.array_equal(y[kept], bx.layer_norm(x[kept], None))
    grad_x, _ = everywhere("norm_backward", lambda: ops.rms_norm_backward(x, x, None))
    assert np.isfinite(grad_x[kept]).all()
    assert np.isnan(grad_x[1]).all()


# --- rotary embedding -----------------------------------------------------------------------------
def angles(*shape):
    a = np.random.default_rng(9).uniform(-np.pi, np.pi, shape)
    return np.cos(a).astype(np.float32), np.sin(a).astype(np.float32)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ((1, 1, 1, 2), None),
        ((2, 3, 5, 6), None),
        ((2, 3, 5, 7), 4),
        ((1, 2, 3, 64), 34),
        ((3, 5, 70, 96), None),
    ],
)
def test_rotary_embedding(shape, dim, interleaved):
    batch, heads, tokens, size = shape
    x = normal(10, *shape)
    half = (dim or size) // 2
    cos, sin = angles(batch, tokens, half)
    options = {"interleaved": interleaved, "rotary_dim": dim}
    (y,) = everywhere("rotary", lambda: (bx.rotary_embedding(x, cos, sin, **options),))
    np.testing.assert_allclose(y, reference.rotary(x, cos, sin, interleaved), rtol=0, atol=1e-6)
    assert np.array_equal(y[..., 2 * half :], x[..., 2 * half :])
    # The 3-d layout, and rows of a table by id.
    flat = x.transpose(0, 2, 1, 3).reshape(batch, tokens, -1)
    (z,) = everywhere(
        "rotary", lambda: (bx.rotary_embedding(flat, cos, sin, num_heads=heads, **options),)
    )
    assert z.shape == flat.shape
    assert np.array_equal(z.reshape(batch, tokens, heads, size).transpose(0, 2, 1, 3), y)
    ids = np.arange(batch * tokens)[::-1].reshape(batch, tokens)
    table = [t.reshape(-1, half)[::-1] for t in (cos, sin)]
    for kind in (np.int64, np.uint8, np.int32):
        found = bx.rotary_embedding(x, *table, position_ids=ids.astype(kind), **options)
        assert np.array_equal(found, y)


def test_rotary_of_any_strides(isa):
    wide = normal(11, 4, 12, 6, 40)
    cos, sin = angles(2, 12, 24)
    for view in (
        wide[::2, ::2, :, 3:27].transpose(0, 2, 1, 3)[:, :, :],
        wide[1:3].transpose(0, 2, 1, 3)[..., ::-1],
        np.broadcast_to(wide[0, :, 0, :24][None, None], (2, 3, 12, 24)),
    ):
        c, s = (t[:, : view.shape[2], : view.shape[3] // 2] for t in (cos, sin))
        assert np.array_equal(
            bx.rotary_embedding(view, c, s), bx.rotary_embedding(view.copy(), c.copy(), s.copy())
        )


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)])
def test_rotary_of_nothing(shape):
    x = np.zeros(shape, np.float32)
    cos = np.zeros((shape[0], shape[2], shape[3] // 2), np.float32)
    assert bx.rotary_embedding(x, cos, cos).shape == shape


def test_rotary_of_float16_and_of_nan():
    x = normal(12, 1, 2, 3, 8)
    cos, sin = angles(1, 3, 4)
    half = bx.rotary_embedding(x.astype(np.float16), cos, sin)
    assert half.dtype == np.float16
    wide = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(half, bx.rotary_embedding(wide, cos, sin).astype(np.float16))
    x[0, 1, 2, 3] = np.nan
    for interleaved in (False, True):
        (y,) = everywhere(
            "rotary", lambda i=interleaved: (bx.rotary_embedding(x, cos, sin, interleaved=i),)
        )
        assert np.isnan(y).sum() == 2


def test_rotary_matches_the_models_own():
    """The tables and the half rotation of the engine, against angles in float64."""
    tokens, size = 9, 16
    inv_freq = (10000.0 ** (-np.arange(0, size, 2) / size)).astype(np.float32)
    cos, sin = _core.rope_table(inv_freq, tokens)
    x = normal(13, 1, 2, tokens, size)
    ids = np.arange(tokens)[None]
    y = bx.rotary_embedding(x, cos, sin, position_ids=ids)
    angle = (ids[..., None].astype(np.float32) * inv_freq).astype(np.float64)
    np.testing.assert_allclose(
        y, reference.rotary(x, np.cos(angle), np.sin(angle)), rtol=0, atol=1e-6
    )


# --- gradients ------------------------------------------------------------------------------------
def slope(function, x, step=1e-5):
    """Central differences of a float64 function's sum, for each element of x."""
    x = np.array(x, np.float64)
    out = np.empty_like(x)
    for i in np.ndindex(x.shape):
        here = x[i]
        x[i] = here + step
        above = function(x)
        x[i] = here - step
        out[i] = (above - function(x)) / (2 * step)
        x[i] = here
    return out


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize(
    ("shape", "axis"), [((1, 1), -1), ((5, 3), -1), ((2, 3, 5), 1), ((3, 33), -1)]
)
def test_norm_gradients(kind, shape, axis):
    x, grad = normal(14, *shape), normal(15, *shape)
    weight, bias = parameters(shape[axis:])

    def loss(x=x, weight=weight, bias=bias):
        b = bias if kind == "layer" else None
        return (grad * reference.norm_over(x, weight, b, 0.01, kind, axis)).sum()

    backward = ops.rms_norm_backward if kind == "rms" else ops.layer_norm_backward
    found = everywhere("norm_backward", lambda: backward(grad, x, weight, eps=0.01, axis=axis))
    wanted = [slope(lambda v: loss(x=v), x), slope(lambda v: loss(weight=v), weight)]
    if kind == "layer":
        wanted.append(slope(lambda v: loss(bias=v), bias))
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6 * max(1, np.abs(b).max()))
    ones = backward(grad, x, np.ones_like(weight), eps=0.01, axis=axis)
    assert np.array_equal(backward(grad, x, None, eps=0.01, axis=axis)[0], ones[0])


@pytest.mark.parametrize("rows", [63, 64, 65, 1000])
def test_parameter_gradients_of_many_rows(rows):
    x, grad = normal(16, rows, 37), normal(17, rows, 37)
    weight, _ = parameters((37,))
    grad_x, grad_weight, grad_bias = everywhere(
        "norm_backward", lambda: ops.layer_norm_backward(grad, x, weight)
    )
    t = reference.norm(x, kind="layer")
    for found, terms in ((grad_weight, grad * t), (grad_bias, grad.astype(np.float64))):
        bound = 2e-7 * np.abs(terms).sum(0)
        assert (np.abs(found - terms.sum(0)) <= bound + 1e-6).all()
    one = ops.layer_norm_backward(grad[50:51], x[50:51], weight)[0]
    assert np.array_equal(one[0], grad_x[50])


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_gradient(interleaved):
    x, grad = normal(18, 2, 2, 3, 6), normal(19, 2, 2, 3, 6)
    cos, sin = angles(2, 3, 2)
    options = {"interleaved": interleaved, "rotary_dim": 4}
    (found,) = everywhere(
        "rotary", lambda: (ops.rotary_embedding_backward(grad, cos, sin, **options),)
    )
    want = slope(lambda v: (grad * reference.rotary(v, cos, sin, interleaved)).sum(), x)
    np.testing.assert_allclose(found, want, rtol=0, atol=2e-6)
    flat = grad.transpose(0, 2, 1, 3).reshape(2, 3, 12)
    again = ops.rotary_embedding_backward(flat, cos, sin, num_heads=2, **options)
    assert np.array_equal(again.reshape(2, 3, 2, 6).transpose(0, 2, 1, 3), found)


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_norm_gradients_against_torch(kind):
    torch = pytest.importorskip("torch", reason="compares with torch's autograd")
    x, grad = normal(20, 40, 96), normal(21, 40, 96)
    weight, bias = parameters((96,))
    tensors = [torch.tensor(a, requires_grad=True) for a in (x, weight, bias)]
    functional = torch.nn.functional
    if kind == "rms":
        functional.rms_norm(tensors[0], (96,), tensors[1], eps=1e-5).backward(torch.tensor(grad))
        found = ops.rms_norm_backward(grad, x, weight)
    else:
        functional.layer_norm(tensors[0], (96,), *tensors[1:]).backward(torch.tensor(grad))
        found = ops.layer_norm_backward(grad, x, weight)
    for a, tensor in zip(found, tensors, strict=False):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=2e-5, atol=2e-5)


def test_rotary_gradient_against_torch():
    torch = pytest.importorskip("torch", reason="compares with torch's autograd")
    x, grad = normal(22, 1, 2, 5, 8), normal(23, 1, 2, 5, 8)
    cos, sin = angles(1, 5, 4)
    t = torch.tensor(x, requires_grad=True)
    c, s = (
        torch.tensor(np.concatenate([cos, cos], -1)),
        torch.tensor(np.concatenate([sin, sin], -1)),
    )
    a, b = t.chunk(2, -1)
    (t * c[:, None] + torch.cat([-b, a], -1) * s[:, None]).backward(torch.tensor(grad))
    found = ops.rotary_embedding_backward(grad, cos, sin)
    np.testing.assert_allclose(found, t.grad.numpy(), rtol=0, atol=1e-6)


# --- errors ---------------------------------------------------------------------------------------
X = np.zeros((2, 3, 4), np.float32)  # as [B, T, H * D]
X4 = np.zeros((2, 3, 5, 4), np.float32)
TABLE = np.zeros((5, 2), np.float32)
IDS = np.zeros((2, 5), np.int64)


def rotate(x=X4, cos=TABLE, sin=TABLE, **options):
    return bx.rotary_embedding(x, cos, sin, **{"position_ids": IDS, **options})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.rms_norm(X.astype("f8"), None), "x: found float64"),
        (lambda: bx.rms_norm(np.float32(1), None), r"axis: found -1, wanted an axis of x \(\)"),
        (lambda: bx.rms_norm(X, None, axis=3), "axis: found 3"),
        (lambda: bx.rms_norm(X, X[0], axis=-1), r"weight: found \(3, 4\), wanted \(4,\)"),
        (lambda: bx.layer_norm(X, X[0], X[0, 0], axis=1), r"bias: found \(4,\), wanted \(3, 4\)"),
        (lambda: bx.layer_norm(X, np.zeros(4, int)), "weight: found int64"),
        (lambda: ops.rms_norm_backward(X[:1], X, None), r"grad: found \(1, 3, 4\), wanted the sh"),
        (lambda: ops.layer_norm_backward(X, X, X[0]), r"weight: found \(3, 4\), wanted \(4,\)"),
        (lambda: rotate(X4.astype(int)), "x: found int64"),
        (lambda: rotate(X4[0, 0]), r"x: found \(5, 4\), wanted \[B, H, T, D\]"),
        (lambda: rotate(X), r"num_heads: found None, wanted a divisor"),
        (lambda: rotate(X, num_heads=3), r"num_heads: found 3, wanted a divisor"),
        (lambda: rotate(num_heads=2), "num_heads: found 2, wanted 3, that of x"),
        (lambda: rotate(rotary_dim=3), "rotary_dim: found 3"),
        (lambda: rotate(rotary_dim=6), "rotary_dim: found 6"),
        (lambda: rotate(rotary_dim=0), "rotary_dim: found 0"),
        (lambda: rotate(X4[..., :3]), "rotary_dim: found 3, wanted an even number up to 3"),
        (lambda: rotate(rotary_dim=2), r"cos: found \(5, 2\), wanted \(5, 1\)"),
        (lambda: rotate(sin=TABLE[:4]), r"sin: found \(4, 2\), wanted \(5, 2\)"),
        (lambda: rotate(cos=np.float32(1)), r"cos: found \(\), wanted \(0, 2\)"),
        (lambda: rotate(position_ids=None), r"cos: found \(5, 2\), wanted \(2, 5, 2\)"),
        (lambda: rotate(cos=TABLE.astype(int)), "cos: found int64"),
        (lambda: rotate(position_ids=IDS[:1]), r"position_ids: found int64 \(1, 5\)"),
        (lambda: rotate(position_ids=IDS + 0.0), "position_ids: found float64"),
        (lambda: rotate(position_ids=IDS + 5), "position_ids: found 5, wanted 0 to 4"),
        (lambda: rotate(position_ids=IDS - 1), "position_ids: found -1"),
        (lambda: ops.rotary_embedding_backward(X4 + 0j, TABLE, TABLE), "grad: found complex64"),
    ],
)
def test_errors_name_what_was_found(call, message):
    with pytest.raises(InvalidShapeError, match=message):
        call()


def test_the_kernels_check_what_they_are_given():
    out, frozen = np.zeros_like(X4), np.zeros_like(X4)
    frozen.flags.writeable = False
    heads = math.prod(IDS.shape)
    for arguments, message in [
        ((X4[0], TABLE, TABLE, None, False, out), "x: found float32 .*wanted a 4-D"),
        ((X4[..., ::2], TABLE, TABLE, None, False, out), "heads must be contiguous"),
        ((X4, TABLE, TABLE, None, False, frozen), "out: the array is read-only"),
        ((X4, TABLE, TABLE, None, False, out[:1]), "out: found .*wanted the shape of x"),
        ((X4, TABLE, TABLE, None, False, out), f"cos: found .*wanted {heads} rows"),
        ((X4, np.zeros((10, 3), "f4"), TABLE, None, False, out), "wanted at most half of heads"),
        ((X4, np.zeros((10, 4), "f4")[:, :2], TABLE, IDS.reshape(-1), False, out), "sin: found"),
        ((X4, np.zeros((5, 4), "f4")[:, :2], TABLE, IDS.reshape(-1), False, out), "contiguous ta"),
    ]:
        with pytest.raises(InvalidShapeError, match=message):
            _core.rotary(*arguments)
    with pytest.raises(InvalidShapeError, match="kind: found 'none'"):
        _core.norm_backward(X[0], X[0], None, 1e-5, "none", out[0, 0, :3], None, None)
    assert not out.any()
