"""Ternary products against int64 and float64 NumPy: exact integers, one answer on every ISA."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import reference_formats as formats
from hypothesis import given, settings
from hypothesis import strategies as st

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import CheckpointError, InvalidShapeError

BITS = ("2", "1.6")
ROWS = (0, 1, 2, 5, 8, 9, 14, 64, 65)


def random_codes(n: int, k: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, n, k]).integers(-1, 2, (n, k), np.int8)


def random_q(m: int, k: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng([seed, m, k]).integers(-128, 128, (m, k)).astype(np.int8)


def product(q: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """int64 [M, N], by way of float64, which holds every partial sum exactly."""
    return (q.astype(np.float64) @ codes.astype(np.float64).T).astype(np.int64)


def linear_reference(
    q: np.ndarray,
    s: np.ndarray,
    codes: np.ndarray,
    scale: np.ndarray,
    divide: bool,
    bias: np.ndarray | None,
) -> np.ndarray:
    """y = (acc / s) * scale or acc / (scale * s), then + bias, each step rounded to float32."""
    acc = product(q, codes).astype(np.float32)
    s = s[:, None]
    y = acc / (scale * s) if divide else (acc / s) * scale
    assert y.dtype == np.float32
    return y if bias is None else y + bias


def source(
    kind: str,
    data: np.ndarray,
    n: int,
    k: int,
    scale: float = 1.0,
    divide: bool = False,
    order: np.ndarray | None = None,
    name: str = "layers.0.q",
) -> tuple:
    return (name, kind, data, n, k, scale, divide, order)


def ran(metrics: bx.DispatchMetrics) -> set[tuple[str, str]]:
    """(op, isa) of what ran."""
    return {(op, isa) for op, _, isa, _ in metrics.as_dict()}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 5, 17, 100, 256, 333])
@pytest.mark.parametrize("n", [1, 3, 63, 65, 130])
def test_exact_at_every_size(isa: str, bits: str, n: int, k: int) -> None:
    codes = random_codes(n, k)
    weight = bx.PackedTernary.pack(codes, 1.0, bits)
    for m in ROWS:
        q = random_q(m, k)
        with bx.DispatchMetrics() as metrics:
            out = bx.ternary_matmul(q, weight)
        assert out.dtype == np.int32
        np.testing.assert_array_equal(out, product(q, codes))
        if m == 1:
            assert ran(metrics) == {("ternary_gemv", isa)}
        if m >= 64:
            assert ran(metrics) == {("ternary_gemm", isa)}


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [6912, 16384, 40000])
def test_saturating_inputs_stay_exact(isa: str, bits: str, k: int, threads: None) -> None:
    """Every sum at its largest magnitude, in every code, for gemv and gemm."""
    bx.set_num_threads(1)  # no task has fewer outputs than a gemm by lookup takes
    for value in (127, -128):
        for code in (-1, 0, 1):
            weight = bx.PackedTernary.pack(np.full((200, k), code, np.int8), 1.0, bits)
            for m in (1, 2, 4, 7, 16, 49):
                out = bx.ternary_matmul(np.full((m, k), value, np.int8), weight)
                np.testing.assert_array_equal(out, np.full((m, 200), k * value * code))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_large_products_on_any_threads(isa: str, bits: str, threads: int) -> None:
    """More than one k block, panel and block of rows; M on both sides of every kernel switch."""
    n, k = 320, 1300
    codes = random_codes(n, k)
    weight = bx.PackedTernary.pack(codes, 1.0, bits)
    q = random_q(800, k)
    expected = product(q, codes)
    before = bx.get_num_threads()
    bx.set_num_threads(threads)
    try:
        for m in (*range(1, 17), 24, 25, 32, 33, 48, 49, 57, 384, 385, 800):
            np.testing.assert_array_equal(bx.ternary_matmul(q[:m], weight), expected[:m])
    finally:
        bx.set_num_threads(before)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 16, 31, 480])
def test_more_outputs_than_a_task_takes(isa: str, bits: str, k: int) -> None:
    codes = random_codes(3137, k)
    weight = bx.PackedTernary.pack(codes, 1.0, bits)
    for m in (2, 65, 91):
        q = random_q(m, k)
        np.testing.assert_array_equal(bx.ternary_matmul(q, weight), product(q, codes))


@pytest.mark.parametrize("rows", [1, 64])
def test_two_threads_really_run(
    rows: int, until_threads: Callable[[int, Callable[[], object]], None]
) -> None:
    """On the slowest ISA, so that a sleeping worker wakes in time."""
    weight = bx.PackedTernary.pack(random_codes(4096, 1024), 1.0)
    q, out = random_q(rows, 1024), np.empty((rows, 4096), np.int32)
    before = bx.get_isa()
    bx.set_isa("scalar")
    try:
        until_threads(2, lambda: _core.ternary_matmul(q, weight, out))
    finally:
        bx.set_isa(before)


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("k", [0, 7])
@pytest.mark.parametrize("m", [0, 1, 9])
def test_empty_sizes(isa: str, n: int, k: int, m: int) -> None:
    weight = bx.PackedTernary.pack(np.ones((n, k), np.int8), 2.0)
    assert weight.shape == (n, k)
    out = bx.ternary_matmul(np.ones((m, k), np.int8), weight)
    np.testing.assert_array_equal(out, np.full((m, n), k))
    y = bx.ternary_linear(np.ones((m, k), np.float32), weight)
    assert y.shape == (m, n)
    np.testing.assert_allclose(y, 2.0 * k, rtol=1e-6)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 9, 35, 50])
def test_linear_has_the_bits_of_its_formula(isa: str, bits: str, divide: bool, rows: int) -> None:
    """Scales of each row, bias, residual and an output whose rows are apart."""
    k, sizes, scales = 160, (64, 20, 7), (0.75, 0.0313, 3.1)
    parts = [random_codes(n, k, seed=n) for n in sizes]
    weight = _core.PackedTernary.from_sources(
        [
            source("codes", part, len(part), k, scale, divide)
            for part, scale in zip(parts, scales, strict=True)
        ],
        bits,
    )
    assert weight.divide == divide
    codes = np.concatenate(parts)
    scale = np.repeat(np.float32(scales), sizes)
    np.testing.assert_array_equal(weight.scale, scale)
    rng = np.random.default_rng(5)
    q = random_q(rows, k)
    s = rng.uniform(1e-3, 1e3, rows).astype(np.float32)
    for bias in (None, rng.standard_normal(len(codes), np.float32)):
        for residual in (False, True):
            wide = rng.standard_normal((rows, len(codes) + 5), np.float32)
            start = wide.copy()
            out = wide[:, 2:-3]
            _core.ternary_linear(q, s, weight, bias, residual, out)
            y = linear_reference(q, s, codes, scale, divide, bias)
            expected = start[:, 2:-3] + y if residual else y
            np.testing.assert_array_equal(out, expected)
            np.testing.assert_array_equal(wide[:, :2], start[:, :2])
            np.testing.assert_array_equal(wide[:, -3:], start[:, -3:])


@pytest.mark.parametrize("kind", formats.KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_source_kind(kind: str, bits: str) -> None:
    n, k = 196, 512
    rng = np.random.default_rng(7)
    codes = random_codes(n, k)
    scale = 1.25
    if kind in ("f32", "f16", "bf16"):
        latent = rng.standard_normal((n, k), np.float32) * np.float32(0.02)
        latent[0, :4] = [0.0, -0.0, 1e-40, -1e-40]  # subnormals and signed zeros
        data = {
            "f32": lambda: latent,
            "f16": lambda: latent.astype(np.float16).view(np.uint16),
            "bf16": lambda: formats.to_bf16(latent),
        }[kind]()
        stored = {
            "f32": lambda: latent,
            "f16": lambda: data.view(np.float16).astype(np.float32),
            "bf16": lambda: formats.from_bf16(data),
        }[kind]()
        codes, expected_scale = formats.absmean(stored)
        given = 0.0
    else:
        data = formats.encode(kind, codes, scale)
        expected_scale = given = scale
    weight = _core.PackedTernary.from_sources([source(kind, data, n, k, given)], bits)
    np.testing.assert_array_equal(weight.unpack(), codes)
    assert weight.scale == pytest.approx(float(expected_scale), rel=1e-7)
    order = rng.permutation(n).astype(np.int32)
    mixed = _core.PackedTernary.from_sources([source(kind, data, n, k, given, order=order)], bits)
    np.testing.assert_array_equal(mixed.unpack(), codes[order])


def test_latent_ties_and_scale() -> None:
    """w s at exactly one half rounds to the even 0; a zero matrix takes the floor of 1e-5."""
    latent = np.array([[1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.5, 0.5]], np.float32)
    assert np.abs(latent).mean() == 1
    weight = _core.PackedTernary.from_sources([source("f32", latent, 1, 8, 0.0)], "2")
    np.testing.assert_array_equal(weight.unpack(), [[1, -1, 0, 0, 1, -1, 0, 0]])
    assert weight.scale == 1
    zero = _core.PackedTernary.from_sources(
        [source("f32", np.zeros((4, 8), np.float32), 4, 8, 0.0)], "2"
    )
    assert zero.scale == pytest.approx(1e-5)
    assert not zero.unpack().any()


@pytest.mark.parametrize("kind", ["hf", "tq2_0", "i2_s", "i2_s_arm", "i2_s_rows4"])
def test_field_of_three_names_the_tensor(kind: str) -> None:
    data = formats.encode(kind, random_codes(128, 256), 1.0)
    for position in (0, 17, 63):
        bad = data.copy()
        bad.reshape(-1)[position] |= 3
        with pytest.raises(CheckpointError, match=r"layers\.0\.q: found a 2-bit field of 3"):
            _core.PackedTernary.from_sources([source(kind, bad, 128, 256)], "2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_latent_weights_must_be_finite(kind: str, value: float) -> None:
    latent = np.ones((8, 16), np.float32)
    latent[5, 3] = value
    data = {
        "f32": lambda: latent,
        "f16": lambda: latent.astype(np.float16).view(np.uint16),
        "bf16": lambda: latent.view(np.uint32).astype(np.uint32) >> 16,
    }[kind]()
    data = data if kind == "f32" else data.astype(np.uint16)
    with pytest.raises(CheckpointError, match=r"layers\.0\.q: .*row 5 that is not finite"):
        _core.PackedTernary.from_sources([source(kind, data, 8, 16, 0.0)], "2")


def test_bad_sources_are_refused() -> None:
    good = random_codes(8, 256)
    hf = formats.encode("hf", good)

    def refused(match: str, *sources: tuple) -> None:
        with pytest.raises(CheckpointError, match=match):
            _core.PackedTernary.from_sources(list(sources), "2")

    two = np.full((8, 256), 2, np.int8)
    refused("a weight other than -1, 0 and 1", source("codes", two, 8, 256))
    for scale in (0.0, -1.0, np.nan, np.inf):
        refused("found a scale of", source("codes", good, 8, 256, scale))
    refused("found data of", source("hf", hf[:1], 8, 256))
    refused("found data of", source("codes", good.astype(np.uint8), 8, 256))
    refused("found data of", source("codes", good[:, ::2], 8, 128))
    refused("a multiple of 4 rows", source("hf", hf, 7, 256))
    refused("columns a multiple of 256", source("tq1_0", hf.reshape(-1), 8, 100))
    refused("a multiple of 128 weights", source("i2_s", hf.reshape(-1), 1, 100))
    refused("a multiple of 64 weights", source("i2_s_arm", hf.reshape(-1), 1, 100))
    refused("a multiple of 4 rows", source("i2_s_rows4", hf.reshape(-1), 7, 256))
    huge = np.empty((0, 5_000_000), np.int8)
    refused("columns, wanted at most 4194304", source("codes", huge, 0, 5_000_000))
    refused("found a matrix of 1099511627776 x", source("codes", good, 2**40, 2**30))
    refused("found a matrix of -8 x", source("codes", good, -8, 256))
    refused("wanted one of codes", source("q4_0", good, 8, 256))
    refused("row_order", source("codes", good, 8, 256, order=np.arange(1, 9, dtype=np.int32)))
    refused(
        "columns, wanted 256",
        source("codes", good, 8, 256),
        source("codes", random_codes(8, 128), 8, 128),
    )
    refused(
        "wanted one rule",
        source("codes", good, 8, 256),
        source("codes", good, 8, 256, divide=True, name="layers.0.k"),
    )
    refused("wanted at least one matrix")


def test_public_packing() -> None:
    codes = random_codes(70, 90)
    for bits in BITS:
        weight = bx.PackedTernary.pack(codes, 0.5, bits)
        assert (weight.shape, weight.scale, weight.bits) == ((70, 90), 0.5, bits)
        np.testing.assert_array_equal(weight.unpack(), codes)
    assert bx.PackedTernary.pack(codes, 0.5, "2").nbytes == 128 * 96 // 4 + 70 * 4
    assert bx.PackedTernary.pack(codes, 0.5, "1.6").nbytes == 128 * 100 // 5 + 70 * 4
    np.testing.assert_array_equal(bx.PackedTernary.pack(codes.T, 1).unpack(), codes.T)
    each = np.linspace(0.1, 1, 70, dtype=np.float32)
    np.testing.assert_array_equal(bx.PackedTernary.pack(codes, each).scale, each)
    for matrix, scale, bits, match in (
        (codes * 2, 1.0, "2", "a weight other than -1, 0 and 1"),
        (codes.astype(np.int16), 1.0, "2", "wanted int8"),
        (codes[0], 1.0, "2", "wanted int8"),
        (codes, 0.0, "2", "scale: found 0"),
        (codes, np.nan, "2", "scale: found"),
        (codes, each[:-1], "2", r"wanted a number or \[70\]"),
        (codes, 1.0, "3", "bits: found '3', wanted '2' or '1.6'"),
    ):
        with pytest.raises(InvalidShapeError, match=match):
            bx.PackedTernary.pack(matrix, scale, bits)


def test_wrong_arguments_change_nothing(isa: str) -> None:
    weight = bx.PackedTernary.pack(random_codes(6, 10), 1.0)
    q = random_q(2, 10)
    out = np.full((2, 6), 7, np.int32)
    for bad_q, bad_out in (
        (q[:, :9], out),
        (q.astype(np.int16), out),
        (q, out[:, :5]),
        (q, out.astype(np.int64)),
        (q, out[::-1]),
    ):
        with pytest.raises(InvalidShapeError):
            _core.ternary_matmul(bad_q, weight, bad_out)
    assert (out == 7).all()
    with pytest.raises(InvalidShapeError, match="q: found"):
        bx.ternary_matmul(q[0], weight)
    with pytest.raises(InvalidShapeError, match=r"x: found float64 .* wanted float32 \[..., 10\]"):
        bx.ternary_linear(np.zeros((2, 10)), weight)
    with pytest.raises(InvalidShapeError, match="x: found"):
        bx.ternary_linear(np.zeros((2, 9), np.float32), weight)
    with pytest.raises(InvalidShapeError, match="bias"):
        bx.ternary_linear(np.zeros((2, 10), np.float32), weight, np.zeros(5, np.float32))


@pytest.mark.parametrize("workers", [1, 5])
def test_a_refused_buffer_inside_a_task_reaches_the_caller(workers: int) -> None:
    """Scratch belongs to threads: new ones ask for theirs inside a task, under a memory limit."""
    codes, q = random_codes(640, 640), random_q(65, 640)
    weight = bx.PackedTernary.pack(codes, 1.0)
    out = np.zeros((65, 640), np.int32)
    errors: list[BaseException] = []

    def work() -> None:
        bx.set_memory_limit(bx.memory_stats().current + 8192)
        try:
            _core.ternary_matmul(q, weight, out)
        except MemoryError as error:
            errors.append(error)
        finally:
            bx.set_memory_limit(0)
        _core.ternary_matmul(q, weight, out)

    before = bx.get_num_threads()
    bx.set_num_threads(workers)
    try:
        bx.ternary_matmul(q[:1], weight)  # a new pool, whose threads have no scratch yet
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    finally:
        bx.set_num_threads(before)
    assert len(errors) == 1
    np.testing.assert_array_equal(out, product(q, codes))


@pytest.mark.parametrize("bits", BITS)
def test_linear_quantises_as_in_training(isa: str, bits: str) -> None:
    """Leading axes, ties to even, the floor of the scale, a row of zeros."""
    k, n = 48, 40
    rng = np.random.default_rng(3)
    x = rng.standard_normal((2, 3, k), np.float32)
    x[0, 0] = 0
    x[0, 1, :6] = [127, 0.5, 1.5, -0.5, -2.5, 126.5]  # s = 1: ties
    x[0, 1, 6:] = 0
    x[0, 2] = 1e-7  # under the floor
    codes = random_codes(n, k)
    bias = rng.standard_normal(n, np.float32)
    weight = bx.PackedTernary.pack(codes, 0.3, bits)
    rows = x.reshape(-1, k)
    s = np.float32(127) / np.maximum(np.abs(rows).max(axis=1), np.float32(1e-5))
    q = np.clip(np.rint(rows * s[:, None]), -128, 127).astype(np.int8)
    assert q[1, :6].tolist() == [127, 0, 2, 0, -2, 126]
    expected = linear_reference(q, s, codes, np.full(n, 0.3, np.float32), False, bias)
    y = bx.ternary_linear(x, weight, bias)
    assert y.shape == (2, 3, n)
    np.testing.assert_array_equal(y.reshape(-1, n), expected)
    np.testing.assert_array_equal(bx.ternary_linear(x[1, 2], weight, bias), expected[-1])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("rows", [1, 4, 11])
def test_linear_has_the_same_bits_on_every_isa(bits: str, rows: int, isa: str) -> None:
    """Alone or in a batch, on any ISA: the scalar kernels' answer for all rows at once."""
    k, n = 1000, 200
    rng = np.random.default_rng(11)
    x = rng.standard_normal((11, k), np.float32)
    each = rng.uniform(1e-3, 2, n).astype(np.float32)
    weight = bx.PackedTernary.pack(random_codes(n, k), each, bits)
    with bx.DispatchMetrics() as metrics:
        found = bx.ternary_linear(x[:rows], weight, each)
    assert any(op.startswith("ternary_") and name == isa for op, name in ran(metrics))
    bx.set_isa("scalar")
    np.testing.assert_array_equal(found, bx.ternary_linear(x, weight, each)[:rows])


@pytest.mark.parametrize("order", ["C", "F"])
def test_any_strides_of_x(order: str) -> None:
    codes = random_codes(5, 12)
    weight = bx.PackedTernary.pack(codes, 1.0)
    x = np.asarray(np.random.default_rng(0).standard_normal((4, 12), np.float32), order=order)
    y = bx.ternary_linear(x, weight)
    np.testing.assert_array_equal(y, bx.ternary_linear(np.ascontiguousarray(x), weight))
    q = np.asarray(random_q(4, 12), order=order)
    np.testing.assert_array_equal(bx.ternary_matmul(q, weight), product(q, codes))


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in formats.KINDS if kind not in ("f32", "f16", "bf16")]),
    bits=st.sampled_from(BITS),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    k=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_round_trips(kind: str, bits: str, rows: list[int], k: int, seed: int) -> None:
    """Stacked sources of one kind, panels and their borders anywhere, rows in any order."""
    unit = {"tq1_0": 256, "tq2_0": 256, "i2_s": 32, "i2_s_arm": 16}.get(kind, 17)
    k *= unit
    rng = np.random.default_rng(seed)
    sources, parts = [], []
    for n in rows:
        n = 4 * n if kind != "codes" else n
        codes = rng.integers(-1, 2, (n, k), np.int8)
        order = rng.permutation(n).astype(np.int32)
        sources.append(source(kind, formats.encode(kind, codes, 1.0), n, k, order=order))
        parts.append(codes[order])
    weight = _core.PackedTernary.from_sources(sources, bits)
    expected = np.concatenate(parts)
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.unpack(), expected)
    q = rng.integers(-128, 128, (3, k)).astype(np.int8)
    np.testing.assert_array_equal(bx.ternary_matmul(q, weight), product(q, expected))
