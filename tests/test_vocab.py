"""Vocabulary projection, top-k and the int8 head against float64; equal bits for any number of
rows, threads and any ISA."""

import numpy as np
import pytest
import reference
from reference_formats import to_bf16
from test_rowwise import QUIET_NAN, everywhere

import bitnet_ext as bx
from bitnet_ext import _core


def stored(table, dtype):
    """What the file holds, and the float32 values it means."""
    if dtype == "f32":
        return table, table
    if dtype == "f16":
        half = table.astype(np.float16)
        return half.view(np.uint16), half.astype(np.float32)
    held = to_bf16(table)
    return held, (held.astype(np.uint32) << 16).view(np.float32)


def project(x, table, dtype, scales=None, bias=None):
    out = np.full((len(x), len(table) + 3), 7, np.float32)
    _core.project(x, table, dtype, scales, bias, out[:, : len(table)])
    assert (out[:, len(table) :] == 7).all()
    return (out[:, : len(table)].copy(),)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [1, 3, 15, 16, 17, 96, 2560])
def test_project(dtype, width):
    rng = np.random.default_rng(width)
    x = rng.normal(0, 1, (61, width)).astype(np.float32)
    held, table = stored(rng.normal(0, 1, (71, width)).astype(np.float32), dtype)
    bias = rng.normal(0, 1, 71).astype(np.float32)
    (y,) = everywhere("vocab_project", lambda: project(x, held, dtype, bias=bias), threads=(1, 3))
    want = x.astype(np.float64) @ table.T.astype(np.float64) + bias
    bound = np.abs(x).astype(np.float64) @ np.abs(table).T.astype(np.float64)
    assert np.all(np.abs(y - want) <= 1e-7 * (width / 16 + 6) * (bound + 1))
    for m in (1, 2, 3, 4, 5, 7, 8, 13, 50):  # both kernels and every tile
        assert np.array_equal(project(x[:m], held, dtype, bias=bias)[0], y[:m]), m
        assert np.array_equal(project(x[m:], held[m:], dtype, bias=bias[m:])[0], y[m:, m:]), m


def test_project_streams_and_panels_agree_on_each_isa(isa):
    rng = np.random.default_rng(5)
    x = rng.normal(0, 1, (20, 1700)).astype(np.float32)
    held, _ = stored(rng.normal(0, 1, (37, 1700)).astype(np.float32), "bf16")
    (together,) = project(x, held, "bf16")
    alone = np.concatenate([project(x[i : i + 1], held, "bf16")[0] for i in range(20)])
    assert np.array_equal(together, alone)


@pytest.mark.parametrize("rows", [1, 3, 20])
def test_project_into_chosen_rows(rows, isa):
    x, table = np.random.default_rng(rows).normal(0, 1, (2, 40, 100)).astype(np.float32)
    x = x[:rows]
    places = np.arange(1, 1 + 2 * rows, 2, dtype=np.int32)
    out = np.full((2 * rows + 2, 40), 7, np.float32)
    _core.project(x, table, "f32", None, None, out, places)
    assert np.array_equal(out[places], project(x, table, "f32")[0])
    assert (np.delete(out, places, 0) == 7).all()


def test_project_int8_head():
    rng = np.random.default_rng(6)
    table = rng.normal(0, 0.05, (64, 2560)).astype(np.float32)
    q, scales = _core.quantise_head(table, "f32")
    x = rng.normal(0, 1, (9, 2560)).astype(np.float32)
    (y,) = everywhere("vocab_project", lambda: project(x, q, "int8", scales=scales))
    for m in (1, 3, 8):
        assert np.array_equal(project(x[:m], q, "int8", scales=scales)[0], y[:m])
    exact = x.astype(np.float64) @ (q.astype(np.float64) * scales.astype(np.float64)[:, None]).T
    np.testing.assert_allclose(y, exact, rtol=1e-4, atol=1e-4)
    # Near-lossless: the rounding of the table, at most half a step a weight, as random signs.
    float_logits = x.astype(np.float64) @ table.T.astype(np.float64)
    step = np.abs(table).max(1) / 127
    noise = np.linalg.norm(x, axis=1)[:, None] * step / np.sqrt(12)
    assert (np.abs(y - float_logits) < 6 * noise).all()


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [1, 15, 16, 17, 96])
def test_quantise_head(dtype, width):
    rng = np.random.default_rng(width)
    held, table = stored(rng.normal(0, 1, (23, width)).astype(np.float32), dtype)
    first = None
    for name in bx.available_isas():
        bx.set_isa(name)
        q, scales = _core.quantise_head(held, dtype)
        first = first or (q, scales)
        assert np.array_equal(q, first[0])
        assert np.array_equal(scales, first[1])
    bx.set_isa("auto")
    assert np.array_equal(scales, np.abs(table).max(1) / np.float32(127))
    assert (
        np.abs(q.astype(np.float64) * scales[:, None] - table) <= 0.5001 * scales[:, None]
    ).all()
    assert np.abs(q).max() == 127


def test_quantise_head_rows_out_of_the_ordinary(isa):
    table = np.zeros((5, 18), np.float32)
    table[1, 17] = np.nan
    table[2, 0] = -np.inf
    table[3] = 1e-45
    table[4] = np.linspace(-1e-38, 1e-38, 18)
    q, scales = _core.quantise_head(table, "f32")
    assert (q[:4] == 0).all()
    assert scales[0] == scales[3] == 0
    assert np.isnan(scales[1:3]).all()
    assert q[4, 0] == -127
    assert q[4, 17] == 127


def test_project_bad_values():
    x = np.ones((2, 20), np.float32)
    x[1, 3] = np.inf
    table = np.ones((4, 20), np.float32)
    table[1, 3], table[2, 19], table[3, 3] = 0, np.nan, -1
    (y,) = everywhere("vocab_project", lambda: project(x, table, "f32"))
    assert np.array_equal(
        y, [[20, 19, np.nan, 18], [np.inf, np.nan, np.nan, -np.inf]], equal_nan=True
    )
    assert (y[np.isnan(y)].view(np.int32) == QUIET_NAN).all()


def test_project_errors():
    x, table = np.zeros((2, 8), np.float32), np.zeros((5, 8), np.float32)
    out = np.zeros((2, 5), np.float32)
    wrong = bx.errors.InvalidShapeError
    with pytest.raises(wrong, match=r"x: found float32 \(2, 8\), wanted rows of 7"):
        _core.project(x, table[:, :7], "f32", None, None, out)
    with pytest.raises(wrong, match=r"out: found float32 \(2, 4\), wanted \[2, 5\]"):
        _core.project(x, table, "f32", None, None, out[:, :4])
    for places in ([1, 0], [1, 1], [-1, 0], [0, 2]):
        with pytest.raises(wrong, match=r"places: found .*, wanted 0 to 1 ascending"):
            _core.project(x, table, "f32", None, None, out, np.array(places, np.int32))
    with pytest.raises(wrong, match=r"places: found int32 \(1,\), wanted contiguous int32 \[2\]"):
        _core.project(x, table, "f32", None, None, out, np.zeros(1, np.int32))
    with pytest.raises(wrong, match="scales: wanted for an int8 table"):
        _core.project(x, table.astype(np.int8), "int8", None, None, out)
    with pytest.raises(wrong, match="table: found float32"):
        _core.project(x, table, "bf16", None, None, out)
    with pytest.raises(wrong, match="k: found 6, wanted 1 to 5"):
        _core.topk(out, 6)
    with pytest.raises(wrong, match="k: found 0"):
        _core.topk(out, 0)


@pytest.mark.parametrize("vocab", [1, 5, 16, 17, 300, 5000])
def test_topk(vocab):
    rng = np.random.default_rng(vocab)
    coarse = rng.integers(-20, 20, (4, vocab)).astype(np.float32)  # many ties
    coarse[1] = np.arange(vocab)  # every element displaces one
    coarse[2] = -np.arange(vocab)
    fine = rng.normal(0, 1, (1, vocab)).astype(np.float32)
    x = np.concatenate([coarse, fine])
    for k in sorted({1, min(2, vocab), min(5, vocab), vocab // 3 + 1, vocab}):
        ids, values = everywhere("topk", lambda k=k: _core.topk(x, k), threads=(1, 2))
        for row, found, value in zip(x, ids, values, strict=True):
            assert found.tolist() == reference.topk(row, k).tolist()
            assert np.array_equal(value, row[found])


def test_topk_whole_vocabulary():
    x = np.random.default_rng(0).normal(0, 3, (1, 128256)).astype(np.float32)
    ids, _ = _core.topk(x, 128256)
    assert ids[0].tolist() == reference.topk(x[0], 128256).tolist()
    assert _core.topk(x, 40)[0][0].tolist() == ids[0, :40].tolist()


@pytest.mark.parametrize("k", [1, 3, 6, 25])
def test_topk_nan_last_and_zeros_equal(k):
    x = np.zeros((3, 25), np.float32)
    x[0, ::2] = np.nan
    x[1, 1::3] = -0.0
    x[1, 7], x[1, 8] = np.inf, -np.inf
    x[2] = np.nan
    ids, values = everywhere("topk", lambda: _core.topk(x, k))
    for row, found in zip(x, ids, strict=True):
        assert found.tolist() == reference.topk(row, k).tolist()
    assert np.array_equal(values, np.take_along_axis(x, ids, 1), equal_nan=True)
