"""The device's cache and the append of rotated keys: the CPU's bits, kept where they belong."""

import numpy as np
import pytest
from reference_attention import round_kv

from bitnet_ext import _core
from bitnet_ext.errors import CacheFullError, InvalidShapeError
from bitnet_ext.gpu.kv_append import advance, append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

SHAPES = [(4, 2, 16, 16), (3, 1, 6, 40), (2, 2, 66, 5)]  # q heads, kv heads, dk, dv
KINDS = ["f32", "f16", "int8"]


def tables(half, positions):
    angle = np.arange(positions)[:, None] * 100.0 ** -(np.arange(half) / half)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def random_rows(rows, q_heads, kv_heads, dk, dv, seed=0):
    rng = np.random.default_rng([seed, rows])
    width = q_heads * dk + kv_heads * (dk + dv)
    return (rng.standard_normal((rows, width)) * 3).astype(np.float32)


def held(device, cache, sequence, layer=0):
    """K and V [length, kv_heads, d] of a sequence as values."""
    slot, n = device.to_host(cache.table)[sequence, 0], cache.length[sequence]
    found = []
    for data, scales, d in (
        (cache.keys, cache.key_scales, cache.dk),
        (cache.values, cache.value_scales, cache.dv),
    ):
        part = device.to_host(data[layer])[slot, :, :n].astype(np.float64)
        assert not part[..., d:].any()  # zeros up to the width
        if cache.kv_dtype == "int8":
            part = part * device.to_host(scales[layer])[slot, :, :n, None].astype(np.float64)
        found.append(part[..., :d].swapaxes(0, 1))
    return found


def put(device, cache, rows, counts, layer=0, angles=None):
    """Append and count ``rows``; q as the device leaves it."""
    plan = DeviceRows.ragged(device, counts)
    cos, sin = (None, None) if angles is None else map(device.to_device, angles)
    qkv = device.to_device(rows)
    heads = append(cache, layer, qkv, plan, cos, sin)
    advance(cache, plan)
    cache.note(counts)
    assert np.array_equal(device.to_host(cache.lengths), cache.length)
    return device.to_host(qkv)[:, : heads * cache.dk].reshape(len(rows), heads, cache.dk)


@pytest.mark.parametrize("kv_dtype", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_turned_and_kept_as_the_cpu_keeps_them(device, shape, kv_dtype):
    q_heads, kv_heads, dk, dv = shape
    counts = [5, 0, 70]
    rows = random_rows(75, *shape)
    rows[3] *= 1e-39  # subnormals
    cache = DeviceCache(device, 2, 3, kv_heads, dk, dv, 80, kv_dtype)
    angles = tables(dk // 2, 80)
    q = put(device, cache, rows, counts, 1, angles)
    assert cache.length.tolist() == counts

    wanted = rows.copy()
    cpu = _core.KVCache(1, 3, kv_heads, dk, dv, 80, "f32")
    cpu.reserve(np.int32(counts))
    seq = np.repeat(np.arange(3, dtype=np.int32), counts)
    position = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    _core.rope_append(wanted, *angles, cpu, 0, seq, position)
    assert q.tobytes() == wanted[:, : q_heads * dk].reshape(q.shape).tobytes()
    kept = wanted[:, q_heads * dk :]  # k, turned too, and v
    k = kept[:, : kv_heads * dk].reshape(-1, kv_heads, dk)
    v = kept[:, kv_heads * dk :].reshape(-1, kv_heads, dv)
    for b in range(3):
        found_k, found_v = held(device, cache, b, 1)
        assert np.array_equal(found_k, round_kv(k[seq == b], kv_dtype))
        assert np.array_equal(found_v, round_kv(v[seq == b], kv_dtype))


def test_vectors_that_are_not_finite_show(device):
    rows = random_rows(2, 1, 1, 8, 8)
    rows[0, 9], rows[1, 16] = np.nan, np.inf
    cache = DeviceCache(device, 1, 1, 1, 8, 8, 4, "int8")
    put(device, cache, rows, [2])
    k, v = held(device, cache, 0)
    assert np.isnan(k).tolist() == [[[True] * 8], [[False] * 8]]
    assert np.isnan(v).tolist() == [[[False] * 8], [[True] * 8]]


def test_inactive_sequences_and_full_ones_take_nothing(device):
    cache = DeviceCache(device, 1, 3, 1, 4, 4, 3)
    put(device, cache, random_rows(5, 1, 1, 4, 4), [1, 1, 3])
    before = [held(device, cache, b) for b in range(3)]
    active = device.to_device(np.array([True, False, True]))
    plan = DeviceRows.one_each(3, active)
    rows = random_rows(3, 1, 1, 4, 4, seed=1)
    append(cache, 0, device.to_device(rows), plan)
    advance(cache, plan)
    assert device.to_host(cache.lengths).tolist() == [2, 1, 3]
    cache.note([1, 0, 0])
    for b in (1, 2):
        for found, wanted in zip(held(device, cache, b), before[b], strict=True):
            assert np.array_equal(found, wanted)
    assert np.array_equal(held(device, cache, 0)[0][1], rows[:1, 4:8])


@pytest.mark.parametrize("kv_dtype", KINDS)
def test_sequences_move_and_multiply(device, kv_dtype):
    cache = DeviceCache(device, 2, 3, 2, 6, 6, 70, kv_dtype)
    rows = random_rows(10, 4, 2, 6, 6)
    for layer in range(2):
        append(cache, layer, device.to_device(rows), plan := DeviceRows.ragged(device, [2, 5, 3]))
    advance(cache, plan)
    cache.note([2, 5, 3])
    before = [held(device, cache, b, 1) for b in range(3)]
    keys, twin = cache.keys, cache.copy()

    cache.select([2, 0])
    assert cache.keys is keys  # only the table changed
    assert cache.length.tolist() == [3, 2]
    cache.select([0, 1, 0])
    assert cache.keys is not keys
    assert device.to_host(cache.lengths).tolist() == [3, 2, 3]
    cache.truncate([1, 9, 3])
    assert device.to_host(cache.lengths).tolist() == cache.length.tolist() == [1, 2, 3]
    put(device, cache, random_rows(1, 4, 2, 6, 6, seed=2), [1, 0, 0], 1)  # not into its twin

    for b, (old, n) in enumerate([(2, 1), (0, 2), (2, 3)]):
        for found, wanted in zip(held(device, cache, b, 1), before[old], strict=True):
            assert np.array_equal(found[:n], wanted[:n])
    cache.reset()
    assert cache.length.tolist() == [0, 0, 0]
    for b in range(3):
        for found, wanted in zip(held(device, twin, b, 1), before[b], strict=True):
            assert np.array_equal(found, wanted)


def test_what_does_not_fit(device):
    cache = DeviceCache(device, 1, 2, 2, 4, 4, 3)
    assert cache.nbytes == 2 * 2 * 2 * 64 * 4 * 4
    with pytest.raises(CacheFullError, match=r"found 0 of 3 tokens in sequence 1, .* 4 more"):
        cache.check_room([3, 4])
    for n in (-1, [1], 0.5):
        with pytest.raises(InvalidShapeError, match="n: found"):
            cache.truncate(n)
    for rows in ([2], [-1], [[0]], [0.5]):
        with pytest.raises(InvalidShapeError, match="rows: found"):
            cache.select(rows)
    plan = DeviceRows.one_each(2)
    for width, dtype in ((24, "float16"), (20, "float32"), (16, "float32")):
        with pytest.raises(InvalidShapeError, match="qkv: found"):
            append(cache, 0, device.to_device(np.zeros((2, width), dtype)), plan)
    qkv = device.to_device(np.zeros((2, 24), np.float32))
    table = device.to_device(np.zeros((3, 3), np.float32))
    with pytest.raises(InvalidShapeError, match="cos, sin: found"):
        append(cache, 0, qkv, plan, table, table)
