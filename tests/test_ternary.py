"""Ternary products against int64 and float64 NumPy: exact integers, one answer on every ISA."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
from ternary_cases import BITS, product, random_codes, random_q, source

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError

ROWS = (0, 1, 2, 5, 8, 9, 14, 64, 65)
RAGGED = (2, 37, 129, 385, 1000)


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


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("n", "k"), [(65, 777), (321, 1301)])
def test_ragged_products_on_any_threads(isa: str, bits: str, n: int, k: int, threads: None) -> None:
    codes = random_codes(n, k)
    weight = bx.PackedTernary.pack(codes, 1.0, bits)
    q = random_q(RAGGED[-1], k)
    expected = product(q, codes)
    for count in (1, 2, 3):
        bx.set_num_threads(count)
        for m in RAGGED:
            np.testing.assert_array_equal(bx.ternary_matmul(q[:m], weight), expected[:m])


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("m", RAGGED[1:])
def test_two_threads_share_ragged_rows(
    isa: str, bits: str, m: int, until_threads: Callable[[int, Callable[[], object]], None]
) -> None:
    weight = bx.PackedTernary.pack(random_codes(1001, 1301), 1.0, bits)
    q, out = random_q(m, 1301), np.empty((m, 1001), np.int32)
    until_threads(2, lambda: _core.ternary_matmul(q, weight, out))


@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [(1, 4096, 1024), (2, 4095, 1025), (37, 1001, 333), (64, 4096, 1024), (385, 65, 777)],
)
def test_two_threads_really_run(
    rows: int, n: int, k: int, until_threads: Callable[[int, Callable[[], object]], None]
) -> None:
    """On the slowest ISA, so that a sleeping worker wakes in time."""
    weight = bx.PackedTernary.pack(random_codes(n, k), 1.0)
    q, out = random_q(rows, k), np.empty((rows, n), np.int32)
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


@pytest.mark.parametrize(("n", "k"), [(64, 320), (192, 2560), (64, 1), (64, 40000)])
def test_a_matrix_packed_by_itself_has_the_bytes_foretold(isa: str, n: int, k: int) -> None:
    codes = source("codes", random_codes(n, k, seed=1), n, k)
    packed = _core.PackedTernary.from_sources([codes], "auto")
    assert packed.nbytes == _core.PackedTernary.stored_bytes(n, k)
    assert packed.bits == "2" or (isa in ("avx512vnni", "amx_int8") and k < 32768)
