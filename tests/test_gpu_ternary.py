"""Ternary matrices on a device and their products: exact integers, the CPU's float bits."""

import gc

import ml_dtypes
import numpy as np
import pytest
from hot_path import HotPath

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import ternary
from bitnet_ext.gpu.product import Product, SplitRoom
from bitnet_ext.gpu.quantise import MOST_ROWS, Activations, NormRows, arrange, norm_quantise
from bitnet_ext.gpu.ternary_gemm import gemm
from bitnet_ext.gpu.ternary_gemv import gemv, norm_gemv
from bitnet_ext.gpu.ternary_wgmma import wgmma
from bitnet_ext.gpu.weight import DeviceTernary

RNG = np.random.default_rng(7)


def random_codes(n, k):
    return RNG.integers(-1, 2, (n, k), np.int8)


def random_q(m, k):
    return RNG.integers(-128, 128, (m, k)).astype(np.int8)


def product(q, codes):
    return (q.astype(np.float64) @ codes.astype(np.float64).T).astype(np.int32)


def arranged(device, q, tiled=False):
    x = Activations.empty(device, *q.shape, tiled)
    arrange(device, device.to_device(q), x)
    return x


# ---- layout


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("n", "k"), [(0, 5), (2, 0), (2, 1), (6, 33), (64, 128), (130, 300)])
def test_weights_come_back(device, n, k, gated):
    codes = random_codes(n, k)
    for bits in ("2", "1.6"):
        weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 0.5, bits), gated=gated)
        assert np.array_equal(device.to_host(weight.unpack()), codes)
        assert weight.nbytes == weight.words.nbytes + 4 * 64 * weight.panels


def test_the_layout_is_what_it_says(device):
    codes = random_codes(80, 300)
    weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
    words = device.to_host(weight.words)
    assert words.shape == (2, 3, 4, 32, 4)
    padded = np.ones((128, 384), np.int64)
    padded[:80, :300] = codes + 1
    for panel, block, tile, lane, i in zip(
        *(RNG.integers(0, size, 300) for size in words.shape), strict=True
    ):
        g, t = lane // 4, lane % 4
        output = 64 * panel + 16 * tile + g + 8 * (i & 1)
        for b in range(4):
            for j in range(4):
                k = 128 * block + 32 * t + 8 * j + 4 * (i >> 1) + b
                code = words[panel, block, tile, lane, i] >> (8 * b + 2 * j) & 3
                assert code == padded[output, k]


# ---- products


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 16, 17, 33])
def test_few_rows_are_exact(device, rows):
    for n, k in [(0, 7), (3, 0), (1, 1), (5, 130), (16, 128), (70, 777), (200, 257)]:
        codes, q = random_codes(n, k), random_q(rows, k)
        weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
        out = device.to_device(np.full((rows, n), 7, np.int32))
        gemv(device, Product(arranged(device, q), weight, out))
        assert np.array_equal(device.to_host(out), product(q, codes))


@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize(("n", "k"), [(3, 0), (1, 1), (5, 130), (70, 777), (200, 257)])
def test_norms_in_front_have_the_bits_of_norms_before(device, kind, n, k):
    """For every number of rows, and each number of tiles in a block."""
    weight = DeviceTernary(device, bx.PackedTernary.pack(random_codes(n, k), 0.3))
    norm = [device.to_device(RNG.standard_normal(k).astype(np.float32)) for _ in range(2)]
    for rows in range(MOST_ROWS + 1):
        x = device.to_device(RNG.standard_normal((rows, k + 3)).astype(np.float32))
        x[:1, : k // 4] = np.nan if rows == 2 else 0
        for bias in (norm[1], None):
            source = NormRows(x[:, 1 : k + 1], kind, norm[0], bias, 1e-5)
            before, front = (device.to_device(np.full((rows, n), 7, np.float32)) for _ in "ab")
            room = Activations.empty(device, rows, k, False)
            norm_quantise(device, source, room)
            gemv(device, Product(room, weight, before))
            for processors in (1, n // 32 + 1, 1000):
                few = Few(device, processors)
                norm_gemv(few, source, Product(room, weight, front))
                assert np.array_equal(device.to_host(front), device.to_host(before), equal_nan=True)


def test_a_norm_in_front_of_more_weights_than_are_in_flight(device):
    n, k, rows = 64, 4500, 2
    weight = DeviceTernary(device, bx.PackedTernary.pack(random_codes(n, k), 0.3))
    x = NormRows(device.to_device(RNG.standard_normal((rows, k)).astype(np.float32)), "rms")
    room = Activations.empty(device, rows, k, False)
    before, front = (device.empty((rows, n), np.float32) for _ in "ab")
    norm_quantise(device, x, room)
    gemv(device, Product(room, weight, before))
    norm_gemv(Few(device, 1), x, Product(room, weight, front))
    assert np.array_equal(device.to_host(front), device.to_host(before))


class Few:
    """``device`` with another number of processors."""

    def __init__(self, device, processors):
        self._device, self.processors = device, processors

    def __getattr__(self, name):
        return getattr(self._device, name)


@pytest.mark.parametrize("rows", [0, 1, 32, 63, 130])
def test_many_rows_are_exact(device, rows):
    for n, k in [(0, 7), (3, 0), (1, 1), (70, 300), (200, 1500)]:
        codes, q = random_codes(n, k), random_q(rows, k)
        weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
        whole_and_shared(device, gemm, arranged(device, q), weight, product(q, codes))


def whole_and_shared(device, kernel, x, weight, wanted):
    """Each tile a block's own, and shared by as many blocks as several devices hold."""
    out = device.to_device(np.full(wanted.shape, 7, np.int32))
    kernel(device, Product(x, weight, out))
    assert np.array_equal(device.to_host(out), wanted)
    for processors in (1, 2, 3, 7):
        few = Few(device, processors)
        room = SplitRoom.empty(device, 3 * processors, 256 * 128)
        for _ in range(2):  # the room is ready for the next
            out[...] = 7
            kernel(few, Product(x, weight, out, split=room))
            assert np.array_equal(device.to_host(out), wanted)
            assert not device.to_host(room.tickets).any()


@pytest.mark.parametrize("rows", [0, 1, 127, 130])
def test_hopper_is_exact(device, rows):
    if device.capability != 90:
        pytest.skip(f"compute capability {device.capability / 10}, wanted 9.0")
    for n, k in [(0, 7), (3, 0), (1, 1), (70, 300), (300, 1500)]:
        codes, q = random_codes(n, k), random_q(rows, k)
        weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
        x = arranged(device, q, tiled=True)
        whole_and_shared(device, wgmma, x, weight, product(q, codes))


# ---- what becomes of the integers


def epilogue(acc, s, scale, divide, bias=None, residual=None, gate="none"):
    """float32 [M, N]: the definition of epilogue.cuh, a rounding a step."""
    acc, s = acc.astype(np.float32), s[:, None]
    with np.errstate(all="ignore"):
        y = acc / (scale * s) if divide else (acc / s) * scale
        y = y if bias is None else y + bias
        if gate != "none":
            half = y.shape[1] // 2
            gates, up = np.ascontiguousarray(y[:, :half]), y[:, half:]
            activated = np.empty_like(gates)
            _core.elementwise(gate, gates.ravel(), activated.ravel())
            y = activated * up
        y = y if residual is None else residual + y
    assert y.dtype == np.float32
    return y


KERNELS = {"gemv": gemv, "gemm": gemm, "wgmma": wgmma}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("gate", ["none", "relu2", "silu"])
@pytest.mark.parametrize("divide", [False, True])
def test_epilogues_have_the_bits_of_float32(device, kernel, gate, divide):
    if kernel == "wgmma" and device.capability != 90:
        pytest.skip("needs compute capability 9.0")
    n, k, rows = 46, 200, 11
    codes, q = random_codes(n, k), random_q(rows, k)
    scale = RNG.uniform(0.01, 3, n).astype(np.float32)
    s = RNG.uniform(0.5, 50, rows).astype(np.float32)
    s[2], s[3] = np.nan, 1e-38
    bias = RNG.standard_normal(n).astype(np.float32)
    packed = source(codes, scale, divide)
    weight = DeviceTernary(device, packed, gated=gate != "none")
    x = arranged(device, q, kernel == "wgmma")
    x.scales[...] = device.to_device(s)
    columns = n if gate == "none" else n // 2
    residual = RNG.standard_normal((rows, columns)).astype(np.float32)
    for dtype in (np.float32, np.float16, ml_dtypes.bfloat16):
        for added in (None, residual):
            for b in (None, bias):
                bits = np.dtype(np.uint16 if dtype is ml_dtypes.bfloat16 else dtype)
                out = device.to_device(np.zeros((rows, columns), bits))
                more = None if added is None else device.to_device(added)
                b_ordered = None if b is None else weight.in_order(b)
                p = Product(x, weight, out, b_ordered, more, gate)
                KERNELS[kernel](device, p)
                wanted = epilogue(product(q, codes), s, packed.scale, divide, b, added, gate)
                with np.errstate(over="ignore"):
                    wanted = wanted.astype(dtype)
                found = device.to_host(out).view(dtype).astype(np.float32)
                np.testing.assert_array_equal(found, wanted.astype(np.float32))


def source(codes, scale, divide):
    """A packed matrix; one that divides has a single scale."""
    if not divide:
        return bx.PackedTernary.pack(codes, scale)
    rows = ("w", "codes", codes, *codes.shape, float(scale[0]), True, None)
    return _core.PackedTernary.from_sources([rows], "2")


def test_sums_as_large_as_they_come(device):
    k, n = 6912, 24
    codes = np.repeat(np.array([[1], [-1], [0]], np.int8), k, 1).repeat(n // 3, 0)
    for value in (127, -128):
        q = np.full((3, k), value, np.int8)
        weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
        for kernel, tiled in [(gemv, False), (gemm, False), (wgmma, True)]:
            if tiled and device.capability != 90:
                continue
            out = device.empty((3, n), np.int32)
            kernel(device, Product(arranged(device, q, tiled), weight, out))
            assert np.array_equal(device.to_host(out), product(q, codes))


def test_an_out_with_distant_rows_is_filled_alone(device):
    codes, q = random_codes(20, 40), random_q(3, 40)
    weight = DeviceTernary(device, bx.PackedTernary.pack(codes, 1.0))
    whole = device.to_device(np.full((6, 50), 7, np.int32))
    gemv(device, Product(arranged(device, q), weight, whole[::2, 5:25]))
    wanted = np.full((6, 50), 7, np.int32)
    wanted[::2, 5:25] = product(q, codes)
    assert np.array_equal(device.to_host(whole), wanted)


# ---- the ops


@pytest.mark.parametrize("rows", [0, 1, 16, 65, 129])
def test_ops_on_a_device(device, rows):
    n, k = 70, 300
    codes, q = random_codes(n, k), random_q(rows, k)
    weight = bx.PackedTernary.pack(codes, RNG.uniform(0.1, 2, n).astype(np.float32))
    found = bx.ternary_matmul(device.to_device(q), weight)
    assert device.owns(found)
    assert np.array_equal(device.to_host(found), bx.ternary_matmul(q, weight))
    x = RNG.standard_normal((rows, k)).astype(np.float32)
    bias = RNG.standard_normal(n).astype(np.float32)
    for b in (None, bias, device.to_device(bias)):
        y = bx.ternary_linear(device.to_device(x), weight, b)
        assert device.owns(y)
        host_bias = None if b is None else bias
        assert np.array_equal(device.to_host(y), bx.ternary_linear(x, weight, host_bias))


def test_ops_take_any_shape_and_strides(device):
    weight = bx.PackedTernary.pack(random_codes(5, 12), 0.5)
    x = RNG.standard_normal((2, 3, 12)).astype(np.float32)
    y = bx.ternary_linear(device.to_device(x), weight)
    assert np.array_equal(device.to_host(y), bx.ternary_linear(x, weight))
    y = bx.ternary_linear(device.to_device(x[0, 0]), weight)
    assert np.array_equal(device.to_host(y), bx.ternary_linear(x[0, 0], weight))
    turned = device.to_device(np.ascontiguousarray(x[0].T)).T
    assert np.array_equal(
        device.to_host(bx.ternary_linear(turned, weight)), bx.ternary_linear(x[0], weight)
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda put, w: bx.ternary_matmul(put(np.zeros((2, 12), np.int16)), w),
        lambda put, w: bx.ternary_matmul(put(np.zeros((2, 13), np.int8)), w),
        lambda put, w: bx.ternary_linear(put(np.zeros((2, 12), np.float64)), w),
        lambda put, w: bx.ternary_linear(put(np.zeros((2, 11), np.float32)), w),
        lambda put, w: bx.ternary_linear(
            put(np.zeros((2, 12), np.float32)), w, put(np.zeros(4, np.float32))
        ),
    ],
)
def test_ops_refuse_what_does_not_fit(device, call):
    weight = bx.PackedTernary.pack(random_codes(5, 12), 0.5)
    with pytest.raises(InvalidShapeError, match=r"found .*, wanted"):
        call(device.to_device, weight)


def test_a_weight_goes_to_the_device_once(device):
    weight = bx.PackedTernary.pack(random_codes(5, 12), 0.5)
    on_device = ternary.device_weight(device, weight)
    assert ternary.device_weight(device, weight) is on_device
    count = len(ternary._weights)
    del weight, on_device
    gc.collect()
    assert len(ternary._weights) == count - 1


@pytest.mark.parametrize(
    ("codes", "gated", "message"),
    [((1, (1 << 18) + 1), False, "columns, wanted at most"), ((3, 4), True, "wanted an even")],
)
def test_weights_that_a_device_refuses(device, codes, gated, message):
    weight = bx.PackedTernary.pack(np.zeros(codes, np.int8), 1.0)
    with pytest.raises(InvalidShapeError, match=message):
        DeviceTernary(device, weight, gated=gated)


@pytest.mark.hot_path
@pytest.mark.parametrize("rows", [1, 70])
def test_the_hot_path_runs_kernels_alone(device, rows):
    n, k = 24, 130
    weight = DeviceTernary(device, bx.PackedTernary.pack(random_codes(n, k), 1.0), gated=True)
    x = device.to_device(RNG.standard_normal((rows, k)).astype(np.float32))
    norm = device.to_device(np.ones(k, np.float32))
    quantised = ternary.activations(device, rows, k)
    out = device.empty((rows, n // 2), np.float32)
    hot = HotPath(device)
    normed = NormRows(x, "rms", norm, None, 1e-5)
    ternary.norm_product(hot, normed, Product(quantised, weight, out, gate="relu2"))
    assert np.isfinite(device.to_host(out)).all()
    for forbidden in (lambda: hot.empty((1,), np.int8), lambda: hot.to_host(out)):
        with pytest.raises(AssertionError, match="in the hot path"):
            forbidden()


def test_launches_are_counted(device):
    weight = bx.PackedTernary.pack(random_codes(24, 130), 1.0)
    x = device.to_device(RNG.standard_normal((5, 130)).astype(np.float32))
    bx.ternary_linear(x, weight)
    with bx.DispatchMetrics() as counted:
        bx.ternary_linear(x, weight)
        bx.ternary_linear(x, weight)
        bx.ternary_linear(device.to_host(x), weight)
    bx.ternary_linear(x, weight)
    counts = counted.as_dict()
    arch = f"sm_{device.capability}"
    on_device = {key: value for key, value in counts.items() if key[1] == "cuda"}
    assert on_device.keys() == {(op, "cuda", arch, "op") for op in ("quantise", "ternary_gemv")}
    gemv_count = on_device["ternary_gemv", "cuda", arch, "op"]
    assert gemv_count.calls == 2
    # words, rows, sums and scales, scale of the weight, results
    assert gemv_count.bytes == 2 * (64 * 256 // 4 + 5 * 256 + 5 * 2 * 4 + 64 * 4 + 5 * 24 * 4)
    assert gemv_count.seconds > 0
    assert {key[1] for key in counts} == {"cpu", "cuda"}
