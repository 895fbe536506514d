"""Norms, quantisation, activations, embeddings, log-softmax against float64; equal bits on every
ISA and any number of threads."""

import numpy as np
import pytest
import reference
from everywhere import everywhere
from reference_formats import to_bf16

import bitnet_ext as bx
from bitnet_ext import _core

WIDTHS = [1, 3, 15, 16, 17, 96, 2560, 6912]
QUIET_NAN = np.float32(np.nan).view(np.int32)


def norm_quant(x, weight=None, bias=None, eps=1e-5, kind="rms"):
    q = np.full((x.shape[0], x.shape[1] + 8), 99, np.int8)
    s = np.empty(len(x), np.float32)
    _core.norm_quant(x, weight, bias, eps, kind, q[:, : x.shape[1]], s)
    assert (q[:, x.shape[1] :] == 99).all()
    return q[:, : x.shape[1]].copy(), s


def norm(x, weight=None, bias=None, eps=1e-5, kind="rms"):
    out = np.empty_like(x)
    _core.norm(x, weight, bias, eps, kind, out)
    return (out,)


def close_codes(q, s, want, want_s, tolerance=2e-4):
    """The codes are right but where the exact value stands next to a half-integer."""
    np.testing.assert_allclose(s, want_s, rtol=2e-6)
    rounded = np.clip(np.rint(want), -128, 127)
    near_half = np.abs(want - np.floor(want) - 0.5) < tolerance
    assert ((q == rounded) | (near_half & (np.abs(q - rounded) <= 1))).all()


def parameters(rng, width, kind):
    weight = rng.uniform(0.5, 1.5, width).astype(np.float32)
    bias = rng.normal(0, 0.3, width).astype(np.float32) if kind == "layer" else None
    return (None, None) if kind == "none" else (weight, bias)


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_quantise(kind, width):
    rng = np.random.default_rng(width)
    x = rng.normal(0.3, 2, (5, width)).astype(np.float32)
    weight, bias = parameters(rng, width, kind)
    (y,) = everywhere("norm", lambda: norm(x, weight, bias, kind=kind))
    want = reference.norm(x, weight, bias, kind=kind)
    # The centred form of one or two nearly equal values magnifies their last bits.
    np.testing.assert_allclose(y, want, rtol=5e-6, atol=5e-6 if kind == "layer" else 1e-6)
    q, s = everywhere("norm_quant", lambda: norm_quant(x, weight, bias, kind=kind))
    if kind != "layer" or width > 3:
        close_codes(q, s, *reference.quantise(want))
    # One definition for both kernels: the codes are those of the norm's own output.
    exact = np.float32(127) / np.maximum(np.abs(y).max(1), np.float32(1e-5))
    assert np.array_equal(s, exact)
    assert np.array_equal(q, np.clip(np.rint(y * exact[:, None]), -128, 127).astype(np.int8))


def test_rows_may_be_apart_and_norm_in_place(isa):
    rng = np.random.default_rng(0)
    wide = rng.normal(0, 1, (7, 60)).astype(np.float32)
    part = wide[:, 5:40]
    alone = norm(part.copy())[0]
    _core.norm(part, None, None, 1e-5, "rms", part)
    assert np.array_equal(part, alone)


def test_many_rows_equal_single_rows():
    rng = np.random.default_rng(1)
    x = rng.normal(0, 1, (300, 96)).astype(np.float32)
    q, s = everywhere("norm_quant", lambda: norm_quant(x))
    for row in (0, 1, 299):
        alone = norm_quant(x[row : row + 1])
        assert np.array_equal(alone[0][0], q[row])
        assert alone[1][0] == s[row]


def test_ties_go_to_even_and_codes_are_clamped():
    """s is 1 here, so the values are the codes before rounding."""
    x = np.array([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5, 3.4999998, -127, 0, 0.25]])
    q, s = everywhere("norm_quant", lambda: norm_quant(x.astype(np.float32), kind="none"))
    assert s[0] == 1
    assert q[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126, -126, 3, -127, 0, 0]


@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_rows_out_of_the_ordinary(kind):
    width = 37
    x = np.zeros((10, width), np.float32)
    x[1] = 1e-30
    x[2] = np.linspace(-1e-40, 1e-40, width)  # subnormal
    x[3] = np.linspace(1, 3, width) * 1e25  # squares overflow
    x[4, 3] = np.inf
    x[5, 36] = -np.inf
    x[6, 20] = np.nan
    x[7, 0], x[7, 36] = np.nan, np.inf
    x[8] = np.linspace(-1, 1, width) * 1e-3
    x[9] = 3.0e38
    (y,) = everywhere("norm", lambda: norm(x, kind=kind))
    q, s = everywhere("norm_quant", lambda: norm_quant(x, kind=kind))
    nan = np.isnan(y)
    assert (y.view(np.int32)[nan] == QUIET_NAN).all()
    for row in (4, 5, 6, 7):
        assert np.isnan(s[row])
        assert (q[row] == 0).all()
        assert nan[row].any() or kind == "none"
    for row in (0, 1, 2):
        assert s[row] == np.float32(127) / np.float32(1e-5) or kind != "none"
        assert np.isfinite(y[row]).all()
    if kind == "rms":
        assert (y[3] == 0).all()
        assert s[3] == np.float32(127) / np.float32(1e-5)
    if kind != "layer":
        close_codes(q[8:9], s[8:9], *reference.quantise(reference.norm(x[8:9], kind=kind)))


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_activate_and_quantise(act, gated, kind):
    for width in (3, 17, 96, 6912):
        rng = np.random.default_rng([width, gated])
        x = rng.normal(0, 2, (4, width * (1 + gated))).astype(np.float32)
        weight, bias = parameters(rng, width, kind)

        def call(x=x, weight=weight, bias=bias, width=width):
            q, s = np.empty((len(x), width), np.int8), np.empty(len(x), np.float32)
            _core.act_quant(x, act, gated, weight, bias, kind, 1e-5, q, s)
            return q, s

        q, s = everywhere("act_quant", call, threads=(1, 3))
        if width > 3:
            want = reference.norm(reference.activate(x, act, gated), weight, bias, kind=kind)
            close_codes(q, s, *reference.quantise(want), tolerance=1e-3)


def test_activation_of_a_bad_row_is_nan():
    x = np.ones((2, 40), np.float32)
    x[1, 39] = np.nan
    q, s = np.ones((2, 20), np.int8), np.empty(2, np.float32)
    _core.act_quant(x, "relu2", True, None, None, "rms", 1e-5, q, s)
    assert s[0] == np.float32(127) / np.float32(1 / np.sqrt(np.float32(1 + 1e-5)))
    assert np.isnan(s[1])
    assert (q[1] == 0).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 96])
def test_embed(dtype, width):
    rng = np.random.default_rng(width)
    table = rng.normal(0, 1, (50, width)).astype(np.float32)
    if dtype == "f16":
        stored = table.astype(np.float16).view(np.uint16)
        table = stored.view(np.float16).astype(np.float32)
    elif dtype == "bf16":
        stored = to_bf16(table)
        table = (stored.astype(np.uint32) << 16).view(np.float32)
    else:
        stored = table
    ids = np.array([49, 0, 7, 7, 3], np.int32)

    def call():
        out = np.empty((5, width), np.float32)
        _core.embed(stored, dtype, ids, out)
        return (out,)

    (out,) = everywhere("embed", call)
    assert np.array_equal(out, table[ids])


def test_add_rows():
    rng = np.random.default_rng(0)
    x, table = (rng.normal(0, 1, (n, 35)).astype(np.float32) for n in (6, 9))
    pos = np.array([8, 0, 0, 3, 4, 1], np.int32)

    def call():
        out = x.copy()
        _core.add_rows(out, table, pos)
        return (out,)

    (out,) = everywhere("add_rows", call)
    assert np.array_equal(out, x + table[pos])


@pytest.mark.parametrize("vocab", [1, 2, 16, 31, 1000, 128256])
def test_log_softmax(vocab):
    rng = np.random.default_rng(vocab)
    x = rng.normal(0, 4, (3, vocab)).astype(np.float32)
    x[1] = 0.125  # uniform: 128256 equal terms
    x[2, -1] = 60
    targets = np.array([vocab // 2, 0, vocab - 1], np.int32)
    want = reference.log_softmax(x)
    (y,) = everywhere("log_softmax", lambda: (_core.log_softmax(x),))
    np.testing.assert_allclose(y, want, rtol=3e-7, atol=1e-6)
    logprob, greedy = everywhere("log_softmax", lambda: _core.log_softmax_gather(x, targets))
    assert np.array_equal(logprob, y[np.arange(3), targets])
    assert np.array_equal(greedy, x.argmax(1) == targets)


def test_log_softmax_out_of_the_ordinary():
    inf = np.inf
    x = np.zeros((6, 20), np.float32)
    x[0, 3] = -inf
    x[1, 19] = np.nan
    x[2, 4] = inf
    x[3] = -inf
    x[4] = np.linspace(-3e38, 3e38, 20)
    targets = np.array([3, 0, 4, 0, 19, 1], np.int32)
    (y,) = everywhere("log_softmax", lambda: (_core.log_softmax(x),))
    assert y[0, 3] == -inf
    assert np.isfinite(np.delete(y[0], 3)).all()
    assert (y[1:4].view(np.int32) == QUIET_NAN).all()
    assert y[4, 19] == 0
    logprob, greedy = everywhere("log_softmax", lambda: _core.log_softmax_gather(x, targets))
    assert np.array_equal(logprob, y[np.arange(6), targets], equal_nan=True)
    assert greedy.tolist() == [False, False, False, False, True, False]


def test_errors_name_what_was_found():
    x = np.zeros((2, 8), np.float32)
    q, s = np.zeros((2, 8), np.int8), np.zeros(2, np.float32)
    wrong = bx.errors.InvalidShapeError
    with pytest.raises(
        wrong, match=r"weight: found float32 \(7,\), wanted contiguous float32 \[8\]"
    ):
        _core.norm(x, np.ones(7, np.float32), None, 1e-5, "rms", x)
    with pytest.raises(wrong, match="kind: found 'batch'"):
        _core.norm(x, None, None, 1e-5, "batch", x)
    with pytest.raises(wrong, match=r"q: found int8 \(2, 8\), wanted \[2, 4\]"):
        _core.act_quant(x, "relu2", True, None, None, "rms", 1e-5, q, s)
    with pytest.raises(wrong, match="act: found 'selu'"):
        _core.act_quant(x, "selu", True, None, None, "rms", 1e-5, q[:, :4], s)
    with pytest.raises(wrong, match="wanted an even width"):
        _core.act_quant(x[:, :7], "silu", True, None, None, "rms", 1e-5, q[:, :3], s)
    with pytest.raises(wrong, match="x: found float64"):
        _core.norm_quant(x.astype(np.float64), None, None, 1e-5, "rms", q, s)
    frozen = x.copy()
    frozen.flags.writeable = False
    with pytest.raises(wrong, match="out: the array is read-only"):
        _core.norm(x, None, None, 1e-5, "rms", frozen)
    ids = np.array([0, 2], np.int32)
    with pytest.raises(wrong, match="ids: found 2 at 1, wanted 0 to 1"):
        _core.embed(x, "f32", ids, np.zeros((2, 8), np.float32))
    with pytest.raises(wrong, match="pos: found -1 at 0"):
        _core.add_rows(x, x, np.array([-1, 0], np.int32))
    with pytest.raises(wrong, match="dtype: found 'f64'"):
        _core.embed(x, "f64", ids, x)
    with pytest.raises(wrong, match="targets: found 8 at 0, wanted 0 to 7"):
        _core.log_softmax_gather(x, np.array([8, 0], np.int32))
    assert not x.any()
    assert not q.any()
