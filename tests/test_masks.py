"""Mask fills against the element loop, on every ISA; windows, batches, streams."""

import tracemalloc

import numpy as np
import pytest
from everywhere import FLOAT_TABLES
from hypothesis import given
from hypothesis import strategies as st

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError


def visible(q_len, k_len, past, left=-1, prefix=0):
    """The definition, bool [q_len, k_len]."""
    diagonal = np.arange(q_len)[:, None] + past
    key = np.arange(k_len)[None, :]
    near = key <= diagonal
    if left >= 0:
        near &= key >= diagonal - left
    return near | (key < prefix)


def values(mask, dtype):
    if dtype == "bool":
        return mask
    return np.where(mask, 0, -np.inf).astype(dtype)


def test_every_small_shape_equals_the_loop():
    whole = visible(130, 65, 0)
    for past in range(66):
        for q_len in range(66):
            rows = whole[past : past + q_len]
            for k_len in range(66):
                mask = bx.create_causal_mask(q_len, k_len, past, dtype=bool)
                assert mask.shape == (q_len, k_len)
                assert np.array_equal(mask, rows[:, :k_len]), (q_len, k_len, past)


def test_every_small_shape_equals_torch():
    torch = pytest.importorskip("torch", reason="compares with torch's tril")
    ones = torch.ones(65, 65, dtype=torch.bool)
    for past in range(66):
        wanted = torch.tril(ones, past).numpy()
        for q_len in range(66):
            for k_len in range(66):
                mask = bx.create_causal_mask(q_len, k_len, past, dtype="bool")
                assert np.array_equal(mask, wanted[:q_len, :k_len]), (q_len, k_len, past)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool"])
def test_every_width_on_every_isa(isa, dtype):
    with bx.DispatchMetrics() as metrics:
        for k_len in range(150):
            for past in (0, 1, 7, 31, 64, 100):
                mask = bx.create_causal_mask(5, k_len, past, window=(40, 0), prefix=3, dtype=dtype)
                assert mask.dtype == dtype
                assert np.array_equal(mask, values(visible(5, k_len, past, 40, 3), dtype))
    table = bx.dispatch_info()["mask"]["current"]
    assert {key[:3] for key in metrics.as_dict()} == {("mask_fill", "cpu", table)}
    assert table == FLOAT_TABLES.get(isa, isa)


@given(
    st.integers(0, 40),
    st.integers(0, 90),
    st.integers(0, 60),
    st.integers(-1, 70),
    st.integers(-1, 70),
    st.integers(0, 100),
)
def test_any_pattern(q_len, k_len, past, left, right, prefix):
    mask = bx.create_causal_mask(q_len, k_len, past, window=(left, right), prefix=prefix)
    assert np.array_equal(mask, values(visible(q_len, k_len, past, left, prefix), "float32"))


def test_default_past_aligns_the_last_query_with_the_last_key():
    assert bx.create_causal_mask(2, 4, dtype="bool").tolist() == [
        [True, True, True, False],
        [True, True, True, True],
    ]
    assert np.array_equal(bx.create_causal_mask(4, 2), bx.create_causal_mask(4, 2, 0))
    assert bx.create_causal_mask(1, 1).tolist() == [[0.0]]


def test_past_of_a_cache():
    class Cache:
        length = np.array([3, 3], np.int32)

    assert np.array_equal(bx.create_causal_mask(2, 9, Cache()), bx.create_causal_mask(2, 9, 3))
    Cache.length = np.array([3, 5], np.int32)
    with pytest.raises(InvalidShapeError, match="create_batch_causal_mask"):
        bx.create_causal_mask(2, 9, Cache())
    batch = bx.create_batch_causal_mask([2, 2], [9, 9], Cache())
    assert np.array_equal(batch[1], bx.create_causal_mask(2, 9, 5))


def test_out_with_any_row_stride_is_filled_alone():
    wide = np.full((6, 40), 7, np.float32)
    out = wide[::2, 3:20]
    assert bx.create_causal_mask(3, 17, 4, out=out) is out
    assert np.array_equal(out, bx.create_causal_mask(3, 17, 4))
    assert (wide[1::2] == 7).all()
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 20:] == 7).all()
    backwards = np.empty((3, 17), np.float32)[::-1]
    bx.create_causal_mask(3, 17, 4, out=backwards)
    assert np.array_equal(backwards, out)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool"])
def test_rows_at_any_address(isa, dtype):
    memory = np.zeros(20_000, np.uint8)
    size = np.dtype(dtype).itemsize
    wanted = values(visible(6, 150, 60, 50, 20), dtype)
    for offset in range(68):
        for apart in (150 * size, 150 * size + 1, 640):
            memory[:] = 7
            out = np.ndarray((6, 150), dtype, memory, offset, (apart, size))
            bx.create_causal_mask(6, 150, 60, window=(50, 0), prefix=20, dtype=dtype, out=out)
            assert np.array_equal(out, wanted), (offset, apart)
            assert (memory[:offset] == 7).all()
            assert (memory[offset + 5 * apart + 150 * size :] == 7).all()


def test_large_masks_use_every_thread(until_threads):
    def fill():
        assert np.array_equal(bx.create_causal_mask(1500, 1500) == 0, np.tri(1500, dtype=bool))

    until_threads(2, fill)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool"])
def test_batch_hides_padding(dtype):
    q_lens, k_lens, pasts = [3, 0, 5], [7, 4, 5], [4, 0, 2]
    batch = bx.create_batch_causal_mask(
        q_lens, k_lens, pasts, window=(3, -1), prefix=1, dtype=dtype
    )
    assert batch.shape == (3, 5, 7)
    for mask, q, k, past in zip(batch, q_lens, k_lens, pasts, strict=True):
        wanted = np.zeros((5, 7), bool)
        wanted[:q, :k] = visible(q, k, past, 3, 1)
        assert np.array_equal(mask, values(wanted, dtype))
    default = bx.create_batch_causal_mask(q_lens, k_lens, dtype=dtype)
    assert np.array_equal(default[0, :3], bx.create_causal_mask(3, 7, dtype=dtype))
    assert bx.create_batch_causal_mask([], []).shape == (0, 0, 0)


@pytest.mark.parametrize("block", [1, 3, 128])
def test_stream_joins_to_the_whole(block):
    parts = list(bx.iter_causal_mask(10, 14, block, window=(5, 0), prefix=2))
    assert all(len(part) <= block for part in parts)
    assert np.array_equal(
        np.concatenate(parts), bx.create_causal_mask(10, 14, window=(5, 0), prefix=2)
    )
    assert list(bx.iter_causal_mask(0, 4)) == []


def test_stream_memory_is_one_block():
    tracemalloc.start()
    try:
        for _ in bx.iter_causal_mask(20_000, 4096, 64):
            pass
        assert tracemalloc.get_traced_memory()[1] < 3 * 64 * 4096 * 4
    finally:
        tracemalloc.stop()


def test_a_thousand_calls_leave_nothing():
    out = np.empty((64, 64), np.float32)
    bx.create_causal_mask(64, 64, out=out)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1000):
            bx.create_causal_mask(64, 64, out=out)
            bx.create_causal_mask(65, 65)
        assert tracemalloc.get_traced_memory()[0] - before < 4096
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bx.create_causal_mask(-1, 2), "q_len: found -1"),
        (lambda: bx.create_causal_mask(2, 2.5), "k_len: found 2.5"),
        (lambda: bx.create_causal_mask(True, 2), "q_len: found True"),
        (lambda: bx.create_causal_mask(2, 2, -3), "past_len: found -3"),
        (lambda: bx.create_causal_mask(2, 2, prefix=-1), "prefix: found -1"),
        (lambda: bx.create_causal_mask(2, 2, window=3), "window: found 3"),
        (lambda: bx.create_causal_mask(2, 2, window=(-2, 0)), r"window: found \(-2, 0\)"),
        (lambda: bx.create_causal_mask(2, 2, dtype="int8"), "dtype: found 'int8'"),
        (lambda: bx.create_causal_mask(2, 2, dtype="nothing"), "dtype: found 'nothing'"),
        (lambda: bx.create_causal_mask(2, 2, out=np.empty((2, 3), "f4")), "out: found float32"),
        (lambda: bx.create_causal_mask(2, 2, out=[[0, 0]]), "out: found list"),
        (
            lambda: bx.create_causal_mask(2, 2, out=np.empty((2, 4), "f4")[:, ::2]),
            "contiguous elements",
        ),
        (lambda: bx.create_batch_causal_mask([1], [1, 2]), "k_lens: found 2 lengths"),
        (lambda: bx.create_batch_causal_mask([1.5], [1]), "q_lens: found"),
        (lambda: bx.create_batch_causal_mask([1], [1], [1, 2]), "past_len: found 2 lengths"),
        (lambda: bx.iter_causal_mask(2, 2, 0), "block: found 0"),
        (lambda: bx.MaskCache(-1), "max_entries: found -1"),
        (lambda: bx.create_causal_mask(2**63, 1), "q_len: found 9223372036854775808"),
        (lambda: bx.create_causal_mask(1, 2**63), "k_len: found 9223372036854775808"),
        (lambda: bx.create_causal_mask(2, 2, 2**40), "past_len: found 1099511627776"),
        (lambda: bx.create_causal_mask(2, 2, prefix=2**63), "prefix: found 9223372036854775808"),
        (lambda: bx.create_batch_causal_mask([1], [1], [2**63]), "past_len: found"),
        (lambda: bx.create_batch_causal_mask([1], [1], prefix=2**63), "prefix: found"),
        (lambda: bx.iter_causal_mask(2, 2, 1, 2**63), "past_len: found 9223372036854775808"),
        (lambda: bx.MaskCache().get(2, 2, 2**63), "past_len: found 9223372036854775808"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(InvalidShapeError, match=message):
        call()


@pytest.mark.parametrize(
    ("dtype", "sizes", "message"),
    [
        ("int32", (2, 3, 0, -1, 0), r"out: found int32 \(2, 3\), wanted float32, float16 or bool"),
        (">f2", (2, 3, 0, -1, 0), "wanted float32, float16 or bool"),
        ("float32", (2, 3, 2**61, -1, 0), "mask: found q_len 2, k_len 3, past 2305843009213693952"),
        ("float32", (2, 3, 0, -2, 0), "left -2"),
        ("float32", (2, 3, 0, -1, -1), "prefix -1"),
        ("float32", (3, 3, 0, -1, 0), "found q_len 3"),
        ("bool", (2, 4, 0, -1, 0), "k_len 4"),
    ],
)
def test_the_fill_checks_what_it_is_given(dtype, sizes, message):
    out = np.ones((2, 3), dtype)
    with pytest.raises(InvalidShapeError, match=message):
        _core.mask_fill(out, *sizes)
    assert (out == 1).all()


def test_the_farthest_sizes():
    far = 2**40 - 1
    assert bx.create_causal_mask(2, 3, far, prefix=far, dtype="bool").all()
    assert bx.create_causal_mask(2, 3, window=(2**80, 2**80)).tolist() == [[0, 0, -np.inf], [0] * 3]
    assert not np.isfinite(list(bx.iter_causal_mask(2, 3, 1, far, window=(0, 0)))).any()


def test_a_read_only_out_is_refused_unchanged():
    out = np.full((2, 2), 5, np.float32)
    out.flags.writeable = False
    with pytest.raises(InvalidShapeError, match="writable"):
        bx.create_causal_mask(2, 2, out=out)
    assert (out == 5).all()


@pytest.mark.parametrize(
    "call",
    [
        lambda device: bx.create_causal_mask(1, 1, device=device),
        lambda device: bx.create_batch_causal_mask([1], [1], device=device),
        lambda device: bx.iter_causal_mask(1, 1, device=device),
    ],
)
def test_other_devices(call):
    with pytest.raises(DeviceUnavailableError, match="'tpu'"):
        call("tpu")
