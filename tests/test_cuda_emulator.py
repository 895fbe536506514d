"""The emulated device itself: its instructions against NumPy, and the faults it must find."""

import ml_dtypes
import numpy as np
import pytest
from cuda_emulator import emulator
from cuda_emulator.probe import PROBE, PROBE_HOPPER

from bitnet_ext import _core

pytestmark = pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))


@pytest.fixture(params=["ascending", "descending"])
def emulated(request):
    return emulator.EmulatedDevice(descending=request.param == "descending")


def run(emulated, kernel, threads, *args, grid=1, shared=0):
    module = PROBE if kernel in PROBE.kernels else PROBE_HOPPER
    emulated.launch(module, kernel, (grid,), (threads,), args, shared)


def zeros(emulated, *shape, dtype=np.int32):
    return emulated.to_device(np.zeros(shape, dtype))


def test_shuffles_and_votes(emulated):
    out = zeros(emulated, 32)
    run(emulated, "warp_sum", 32, out)
    assert (out == sum(i * i for i in range(32))).all()
    votes = zeros(emulated, 32, dtype=np.uint32)
    run(emulated, "half_votes", 32, votes)
    assert (votes[:16] == 0xAAAA).all()
    assert (votes[16:] == 0xFFFF0000).all()


def test_barriers_and_atomics(emulated):
    numbers = emulated.to_device(np.arange(96, dtype=np.int32))
    out = zeros(emulated, 96)
    run(emulated, "reverse<true>", 96, out, numbers, shared=96 * 4)
    assert np.array_equal(out, numbers[::-1])
    number = zeros(emulated, 32)
    run(emulated, "hand_over", 64, number)
    assert (number == 42).all()
    total = zeros(emulated, 1)
    run(emulated, "count", 64, total, grid=4)
    assert total[0] == 4 * 32 + 0 + 1 + 1 + 2


def test_a_missing_barrier_shows(emulated):
    numbers = emulated.to_device(np.arange(96, dtype=np.int32))
    out = zeros(emulated, 96)
    run(emulated, "reverse<false>", 96, out, numbers, shared=96 * 4)
    assert not np.array_equal(out, numbers[::-1])


def test_copies_come_when_waited_for(emulated):
    numbers = emulated.to_device(np.arange(64, dtype=np.int32))
    out = zeros(emulated, 64)
    run(emulated, "copy<true>", 16, out, numbers, np.int32(10), shared=256)
    assert np.array_equal(out, np.where(np.arange(64) < 40, numbers, 0))
    run(emulated, "copy<false>", 16, out, numbers, np.int32(16), shared=256)
    assert (out.view(np.uint8) == 0xA5).all()


@pytest.mark.parametrize(
    ("kernel", "args", "message"),
    [
        ("deadlock", (), "deadlock: .* a barrier"),
        ("lost_lane", ("out",), "deadlock: .* __shfl_sync"),
        ("beyond", ("out", np.int32(64)), "outside of every array"),
        ("beyond", ("out", np.int64(0)), "argument 1: int64, wanted 4 bytes"),
        ("beyond", ("out", 0), "wanted a NumPy scalar"),
        ("beyond", ("half", np.int32(0)), "argument 0: float16, wanted elements of 4 bytes"),
        ("copy<true>", ("out", "out", np.int32(0)), "outside of 0 bytes"),
    ],
)
def test_faults_are_named(emulated, kernel, args, message):
    arrays = {"out": zeros(emulated, 64), "half": zeros(emulated, 64, dtype=np.float16)}
    args = [arrays[a] if isinstance(a, str) else a for a in args]
    with pytest.raises(AssertionError, match=message):
        run(emulated, kernel, 64 if kernel == "deadlock" else 32, *args)
    out = zeros(emulated, 32)
    run(emulated, "warp_sum", 32, out)  # and the next launch is well


@pytest.mark.parametrize("rounds", [1, 2, 3])
def test_bulk_copies_come_when_waited_for(emulated, rounds):
    numbers = emulated.to_device(np.arange(64 * rounds, dtype=np.int32))
    out = zeros(emulated, 64 * rounds)
    run(emulated, "bulk<true>", 64, out, numbers, np.int32(rounds), shared=264)
    assert np.array_equal(out, numbers)
    run(emulated, "bulk<false>", 64, out[:64], numbers, np.int32(1), shared=264)
    assert (out[:64].view(np.uint8) == 0xA5).all()


@pytest.mark.parametrize(
    ("kernel", "message"),
    [("no_barrier", "not initialised"), ("no_bytes", "deadlock: .* a counting barrier")],
)
def test_faults_of_counting_barriers_are_named(emulated, kernel, message):
    with pytest.raises(AssertionError, match=message):
        run(emulated, kernel, 32, shared=64)


def test_a_warpgroup_multiplies(emulated):
    rng = np.random.default_rng(0)
    a = rng.integers(0, 256, (64, 32)).astype(np.uint8)
    b = rng.integers(-128, 128, (128, 32)).astype(np.int8)
    wanted = 2 * (a.astype(np.int32) @ b.T.astype(np.int32))
    left, right = emulated.to_device(a.view(np.uint32)), emulated.to_device(b.view(np.uint8))
    d = zeros(emulated, 64, 128)
    run(emulated, "multiply<true>", 128, d, left, right, shared=128 * 128)
    assert np.array_equal(d, wanted)
    run(emulated, "multiply<false>", 128, d, left, right, shared=128 * 128)
    assert not np.array_equal(d, wanted)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_bytes_multiply(emulated, dtype):
    rng = np.random.default_rng(0)
    low = np.iinfo(dtype).min
    a = rng.integers(low, low + 256, (16, 32)).astype(dtype)
    b = rng.integers(-128, 128, (8, 32)).astype(np.int8)
    d = zeros(emulated, 16, 8)
    words = [emulated.to_device(x.view(np.uint32)) for x in (a, b)]
    run(emulated, f"multiply_bytes<{'true' if low == 0 else 'false'}>", 32, d, *words)
    assert np.array_equal(d, a.astype(np.int32) @ b.T.astype(np.int32))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["half_t", "bfloat_t"])
def test_halves_multiply(emulated, name, transposed):
    rng = np.random.default_rng(0)
    dtype = np.float16 if name == "half_t" else ml_dtypes.bfloat16
    a, b = (rng.standard_normal((n, 16)).astype(dtype) for n in (16, 8))
    stored = np.ascontiguousarray(b.T) if transposed else b
    d = zeros(emulated, 16, 8, dtype=np.float32)
    words = [emulated.to_device(x.view(np.uint32)) for x in (a, stored)]
    kernel = f"multiply_halves<{name}, {'true' if transposed else 'false'}>"
    run(emulated, kernel, 32, d, *words, shared=768)
    assert np.array_equal(d, (a.astype(np.float64) @ b.astype(np.float64).T).astype(np.float32))


def test_conversions_round_to_even(emulated):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 1000, dtype=np.uint32)
    special = [0.5, 1.5, 2.5, -0.5, 2049, 65519.9, 65520, 1e-8, 3e9, -3e9, np.inf, 0.0]
    numbers = np.concatenate([bits.view(np.float32), np.array(special, np.float32)])
    numbers = numbers[~np.isnan(numbers)][:960].reshape(-1, 32)
    for row in (*numbers, np.resize(np.array([*special, np.nan], np.float32), 32)):
        half, bfloat = (zeros(emulated, 32, dtype=np.uint16) for _ in range(2))
        back, whole = zeros(emulated, 32, 2, dtype=np.float32), zeros(emulated, 32)
        run(emulated, "convert", 32, emulated.to_device(row), half, bfloat, back, whole)
        with np.errstate(over="ignore"):
            as_half, as_bfloat = row.astype(np.float16), row.astype(ml_dtypes.bfloat16)
        kept = ~np.isnan(row)
        assert np.array_equal(half[kept], as_half.view(np.uint16)[kept])
        assert np.array_equal(bfloat[kept], as_bfloat.view(np.uint16)[kept])
        wanted = np.stack([as_half, as_bfloat.astype(np.float32)], 1)
        assert np.array_equal(back, wanted, equal_nan=True)
        clipped = np.clip(np.rint(np.nan_to_num(row.astype(np.float64))), -(2**31), 2**31 - 1)
        assert np.array_equal(whole, clipped)


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("np.asarray(there)", TypeError),
        ("np.array([there, there])", TypeError),
        ("np.ascontiguousarray(there, np.float64)", TypeError),
        ("_core.topk(there[None], 1)", TypeError),
        ("there + host", TypeError),
        ("host * there", TypeError),
        ("np.concatenate([there, host])", TypeError),
        ("there.__setitem__(slice(None), host)", ValueError),
    ],
)
def test_the_package_may_not_mix_the_host_with_a_device(device, code, error):
    """As on a card: CuPy converts nothing silently."""
    host = np.arange(3, dtype=np.float32)
    names = {
        "np": np,
        "_core": _core,
        "host": host,
        "there": device.to_device(host),
        "__name__": "bitnet_ext.any",
    }
    with pytest.raises(error):
        eval(code, names | {"__name__": "bitnet_ext.any"})
