"""exp, log, tanh, erf, sin, cos of our own: within the stated bounds, the same bits on each ISA."""

import numpy as np
import pytest
from reference import ACTIVATIONS, erf

import bitnet_ext as bx
from bitnet_ext import _core

REFERENCES = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "erf": erf}
BOUNDS = {"exp": 1, "log": 1, "tanh": 2, "erf": 1}  # csrc/rowwise/math.h
SPECIAL = np.array(
    [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38,
     1.0, -1.0, 88.72283, 88.72284, -87.33655, -103.97, -103.98, 0.625, 0.921875, 65504.0, 65520.0,
     6.1e-5, 5.96e-8, 2.98e-8],
    np.float32,
)  # fmt: skip


def call(op, x):
    out = np.empty_like(x)
    _core.elementwise(op, x, out)
    return out


def on_every_isa(op, x):
    before = bx.get_isa()
    results = []
    for isa in bx.available_isas():
        bx.set_isa(isa)
        results.append(call(op, x))
    bx.set_isa(before)
    for isa, other in zip(bx.available_isas(), results, strict=True):
        nan = np.isnan(results[0])
        assert np.array_equal(nan, np.isnan(other)), isa
        assert np.array_equal(results[0].view(np.int32)[~nan], other.view(np.int32)[~nan]), isa
    return results[0]


def ulps(got, want):
    """|got - want| in units of want's last place, subnormal results included."""
    spacing = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
    return np.abs(got.astype(np.float64) - want) / spacing


def sweep(op, rng):
    if op == "log":  # every magnitude, and densely around 1
        magnitudes = rng.integers(1, 0x7F800000, 60000, dtype=np.int64).astype(np.int32)
        near_one = 1 + rng.uniform(-0.4, 0.5, 20000).astype(np.float32)
        return np.concatenate([magnitudes.view(np.float32), near_one.astype(np.float32)])
    wide = {"exp": 104, "tanh": 10, "erf": 5}[op]
    tiny = rng.integers(1, 0x3F800000, 20000, dtype=np.int64).astype(np.int32).view(np.float32)
    x = np.concatenate([rng.uniform(-wide, wide, 60000).astype(np.float32), tiny, -tiny])
    return x if op != "exp" else x[x < 88.7]


@pytest.mark.parametrize("op", ["exp", "log", "tanh"])
def test_within_bounds(op):
    x = sweep(op, np.random.default_rng(1))
    got = on_every_isa(op, x)
    assert ulps(got, REFERENCES[op](x.astype(np.float64))).max() <= BOUNDS[op]


def test_erf_within_bounds():
    x = sweep("erf", np.random.default_rng(2))[::4].copy()
    got = on_every_isa("erf", x)
    assert ulps(got, erf(x.astype(np.float64))).max() <= BOUNDS["erf"]


@pytest.mark.parametrize("op", [*REFERENCES, *ACTIVATIONS, "f16"])
def test_special_values_agree_between_isas(op):
    on_every_isa(op, SPECIAL)


def test_limits():
    inf = np.float32(np.inf)
    x = np.array([inf, -inf, np.nan, -1.0, 0.0], np.float32)
    assert np.array_equal(call("exp", x)[:3], [inf, 0, np.nan], equal_nan=True)
    assert np.array_equal(call("log", x), [inf, np.nan, np.nan, np.nan, -inf], equal_nan=True)
    assert np.array_equal(call("tanh", x)[:3], [1, -1, np.nan], equal_nan=True)
    assert np.array_equal(call("erf", x)[:3], [1, -1, np.nan], equal_nan=True)


def test_half_precision_rounds_as_numpy():
    rng = np.random.default_rng(3)
    x = rng.integers(0, 0x7F800000, 50000, dtype=np.int64).astype(np.int32).view(np.float32)
    x = np.concatenate([x, -x, SPECIAL])
    with np.errstate(over="ignore"):
        want = x.astype(np.float16).astype(np.float32)
    assert np.array_equal(on_every_isa("f16", x), want, equal_nan=True)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activations(act):
    x = np.random.default_rng(4).normal(0, 4, 20000).astype(np.float32)
    got = on_every_isa(act, x)
    want = ACTIVATIONS[act](x.astype(np.float64))
    # The negative tails of gelu cancel in 1 + erf: absolute there, as in every float32 form.
    assert np.all(np.abs(got - want) <= 4e-7 * np.maximum(np.abs(want), np.abs(x)))


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 33])
def test_lengths(isa, n):
    x = np.linspace(-3, 3, n, dtype=np.float32)
    guarded = np.full(n + 16, 7, np.float32)
    _core.elementwise("tanh", x, guarded[:n])
    assert (guarded[n:] == 7).all()
    assert ulps(guarded[:n], np.tanh(x.astype(np.float64))).max(initial=0) <= 2


def test_unknown_names_are_refused():
    with pytest.raises(bx.errors.InvalidShapeError, match="op: found 'sinh'"):
        call("sinh", SPECIAL)


@pytest.mark.parametrize("positions", [1, 2, 5000])
def test_rope_table(positions):
    inv_freq = (1 / 500000.0 ** (np.arange(64) / 64)).astype(np.float32)
    cos, sin = _core.rope_table(inv_freq, positions)
    angle = np.arange(positions, dtype=np.float32)[:, None] * inv_freq
    assert angle.dtype == np.float32
    assert ulps(cos, np.cos(angle.astype(np.float64))).max() < 0.51
    assert ulps(sin, np.sin(angle.astype(np.float64))).max() < 0.51


def test_rope_table_far_out():
    """Angles up to 2^20, sampled by a frequency that spreads them."""
    inv_freq = np.array([997.3, 499.9, -1023.9], np.float32)
    cos, sin = _core.rope_table(inv_freq, 1024)
    angle = (np.arange(1024, dtype=np.float32)[:, None] * inv_freq).astype(np.float64)
    assert np.abs(angle).max() > 1e6
    assert ulps(cos, np.cos(angle)).max() < 0.51
    assert ulps(sin, np.sin(angle)).max() < 0.51


def test_rope_table_refuses_larger_angles():
    with pytest.raises(bx.errors.InvalidShapeError, match="angles up to"):
        _core.rope_table(np.array([1.0, 2000.0], np.float32), 1024)
    with pytest.raises(bx.errors.InvalidShapeError, match="angles up to"):
        _core.rope_table(np.array([np.nan], np.float32), 4)
