"""Attention over a device's cache: the CPU's bits, and one answer from every path."""

import numpy as np
import pytest
from attention_cases import random_case, reference, run, same_bits
from cuda_emulator import emulator

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.attend import StepRoom, attend, attend_step
from bitnet_ext.gpu.kv_append import advance, append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows

SHAPES = [  # q heads, kv heads, dk, dv
    (2, 2, 2, 2),
    (3, 1, 6, 6),
    (8, 2, 16, 16),
    (7, 1, 24, 40),
    (4, 4, 33, 7),
    (1, 1, 136, 150),
]


@pytest.fixture
def rng():
    """The same numbers in every run."""
    return np.random.default_rng(11)


def new_cache(device, case, spare=0):
    shape = (case.kv_heads, case.dk, case.dv, case.longest + spare)
    return DeviceCache(device, 1, len(case.sequences), *shape, case.kv_dtype)


def device_step(device, case, cache, counts, plan=None, **options):
    """Append and attend the next ``counts[b]`` rows; outputs per sequence."""
    ends = cache.length + counts
    parts = [s[e - n : e] for s, e, n in zip(case.sequences, ends, counts, strict=True)]
    if plan is None:
        plan = DeviceRows.ragged(device, counts)
        rows = np.concatenate(parts)
    else:  # a row for each sequence
        rows = np.stack(
            [p[0] if len(p) else np.full_like(case.sequences[0][0], np.nan) for p in parts]
        )
    qkv = device.to_device(rows)
    cos, sin = case.tables(case.longest)
    tables = (None, None) if cos is None else (device.to_device(cos), device.to_device(sin))
    out = device.empty((len(rows), case.q_heads * case.dv), np.float32)
    options |= {"scale": float(case.scale), "window_left": case.window_left}
    if plan.starts is None:
        attend_step(cache, 0, qkv, plan, out, *tables, **options)
    else:
        append(cache, 0, qkv, plan, *tables)
        attend(cache, 0, qkv, plan, out, **options)
    advance(cache, plan)
    cache.note(counts)
    host = device.to_host(out)
    if plan.starts is not None:
        return np.split(host, np.cumsum(counts)[:-1])
    assert not host[np.array(counts) == 0].any()  # zeros where inactive
    return [host[b : b + n] for b, n in enumerate(counts)]


def device_run(device, case, chunk=None, cache=None, **options):
    """Whole sequences, ``chunk`` rows of each at a time; decode steps where ``chunk`` is 0."""
    cache = cache or new_cache(device, case)
    outs = [[] for _ in case.sequences]
    while True:
        left = [len(s) - n for s, n in zip(case.sequences, cache.length, strict=True)]
        counts = [min(n, n if chunk is None else max(chunk, 1)) for n in left]
        if not any(counts):
            return [np.concatenate(o) if o else np.empty(0) for o in outs]
        plan = None
        if chunk == 0:
            active = None if all(counts) else device.to_device(np.array(counts, bool))
            plan = DeviceRows.one_each(len(counts), active)
        for o, part in zip(
            outs, device_step(device, case, cache, counts, plan, **options), strict=True
        ):
            o.append(part)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_cpu_s_bits(device, rng, shape):
    case = random_case(rng, [3, 0, 70, 1], *shape, rope=shape[2] % 2 == 0)
    assert same_bits(device_run(device, case), run(case))


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_whole_chunked_and_decoded_rows_agree(device, rng, kv_dtype):
    case = random_case(rng, [12, 2, 70], 6, 2, 8, 12, kv_dtype=kv_dtype)
    whole = run(case)
    for chunk in (None, 13, 0):
        assert same_bits(device_run(device, case, chunk), whole), chunk


@pytest.mark.parametrize("window_left", [-1, 0, 70, 600])
def test_chunks_of_keys_merge_in_order(device, rng, window_left):
    case = random_case(rng, [1030], 2, 1, 4, window_left=window_left)
    whole = run(case)
    assert same_bits(device_run(device, case), whole)
    cache = new_cache(device, case)
    device_step(device, case, cache, [1022])
    for position in range(1022, 1030):
        plan = DeviceRows.one_each(1)
        out = device_step(device, case, cache, [1], plan)[0]
        assert same_bits([out], [whole[0][position : position + 1]])


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_a_step_leaves_its_room_ready_for_the_next(device, rng, precision):
    case = random_case(rng, [602, 5], 2, 1, 4)
    cache = new_cache(device, case)
    whole = device_run(device, case, precision=precision)
    device_step(device, case, cache, [599, 2], precision=precision)
    room = StepRoom.empty(cache, 2)
    for back in (3, 2, 1):
        options = {"precision": precision, "room": room}
        out = device_step(device, case, cache, [1, 1], DeviceRows.one_each(2), **options)
        assert same_bits(out, [rows[len(rows) - back :][:1] for rows in whole])
        assert not device.to_host(room.tickets).any()
    assert np.isfinite(device.to_host(room.states)[0]).all()


@pytest.mark.parametrize("capability", [80, 86])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
@pytest.mark.parametrize("shape", [(9, 1, 136, 150), (2, 2, 128, 64), (12, 1, 6, 200)], ids=str)
def test_steps_of_every_shape(rng, capability, kv_dtype, shape):
    """Several tiles of query heads, slices of keys and of values, stages of shared memory."""
    if reason := emulator.missing():
        pytest.skip(reason)
    case = random_case(rng, [67, 1], *shape, kv_dtype=kv_dtype)
    device = emulator.EmulatedDevice(capability)
    steps, whole = new_cache(device, case), new_cache(device, case)
    assert same_bits(device_run(device, case, 0, steps), run(case))
    device_run(device, case, None, whole)
    for kept in ("keys", "values", "key_scales", "value_scales"):
        found, wanted = (device.to_host(getattr(cache, kept)) for cache in (steps, whole))
        assert np.array_equal(found, wanted)


def test_values_that_are_not_finite_stay_where_they_are_seen(device, rng):
    case = random_case(rng, [70], 2, 1, 8, rope=False, window_left=5)
    case.sequences[0][20, -3:] = np.inf, np.nan, -np.inf
    found, wanted = device_run(device, case), run(case)
    assert np.array_equal(found[0], wanted[0], equal_nan=True)
    assert (~np.isfinite(found[0])).any(1).nonzero()[0].tolist() == list(range(20, 26))


def test_what_does_not_fit(device, rng):
    case = random_case(rng, [2, 2], 4, 2, 8)
    cache = new_cache(device, case)
    qkv = device.to_device(np.zeros((2, 64), np.float32))
    plan = DeviceRows.one_each(2)
    for shape, dtype in (((2, 31), "float32"), ((1, 32), "float32"), ((2, 32), "float16")):
        for call in (attend, attend_step):
            with pytest.raises(InvalidShapeError, match="out: found"):
                call(cache, 0, qkv, plan, device.empty(shape, dtype), scale=1.0)
    tables = [device.to_device(np.zeros((4, 3), np.float32))] * 2
    with pytest.raises(InvalidShapeError, match="cos, sin: found"):
        attend_step(cache, 0, qkv, plan, device.empty((2, 32), np.float32), *tables, scale=1.0)


# --- half precision ----------------------------------------------------------------------------

HALF = ["f16", "bf16"]
ERROR = {"f16": 2e-3, "bf16": 1.5e-2}
KV = ["f32", "f16", "int8"]


@pytest.mark.parametrize("precision", HALF)
@pytest.mark.parametrize("shape", [(3, 1, 6, 6), (8, 2, 16, 16), (7, 1, 128, 100)], ids=str)
def test_half_precision_follows_the_definition(device, rng, shape, precision):
    case = random_case(rng, [3, 0, 70, 1], *shape)
    found = device_run(device, case, precision=precision)
    errors = [np.abs(a - b).max(initial=0) for a, b in zip(found, reference(case), strict=True)]
    assert max(errors) < ERROR[precision]
    assert not same_bits(found, run(case))  # the matrix units have rounded


@pytest.mark.parametrize("kv_dtype", KV)
@pytest.mark.parametrize("precision", HALF)
def test_whole_chunked_and_decoded_rows_agree_in_half_precision(device, rng, precision, kv_dtype):
    case = random_case(rng, [12, 2, 70], 6, 2, 8, 12, kv_dtype=kv_dtype)
    whole = device_run(device, case, precision=precision)
    errors = [np.abs(a - b).max() for a, b in zip(whole, reference(case), strict=True)]
    assert max(errors) < ERROR[precision]
    for chunk in (13, 0):
        assert same_bits(device_run(device, case, chunk, precision=precision), whole), chunk


@pytest.mark.parametrize("window_left", [-1, 0, 70, 300])
def test_chunks_of_keys_merge_in_order_in_half_precision(device, rng, window_left):
    case = random_case(rng, [520, 3], 4, 1, 64, window_left=window_left, kv_dtype="f16")
    whole = device_run(device, case, precision="f16")
    assert np.abs(whole[0] - reference(case)[0]).max() < ERROR["f16"]
    cache = new_cache(device, case)
    device_step(device, case, cache, [509, 0], precision="f16")
    for position in (509, 510, 511, 512, 513):
        plan = DeviceRows.one_each(2, device.to_device(np.array([True, False])))
        out = device_step(device, case, cache, [1, 0], plan, precision="f16")[0]
        assert same_bits([out], [whole[0][position : position + 1]])


@pytest.mark.parametrize("precision", HALF)
def test_nothing_is_read_past_a_sequence_s_end(device, rng, precision):
    case = random_case(rng, [5], 2, 1, 8, kv_dtype="f16")
    cache = new_cache(device, case)
    cache.keys[...] = cache.values[...] = np.nan
    found = device_run(device, case, 0, cache, precision=precision)
    assert same_bits(found, device_run(device, case, precision=precision))
    assert np.isfinite(found[0]).all()


def test_what_half_precision_does_not_do(device, rng):
    case = random_case(rng, [2], 1, 1, 136)
    cache = new_cache(device, case)
    qkv, out = (device.to_device(np.zeros((1, n), np.float32)) for n in (3 * 136, 136))
    for precision in ("f16", "int8"):
        with pytest.raises(InvalidShapeError, match=f"precision: found '{precision}' for heads"):
            attend(cache, 0, qkv, DeviceRows.one_each(1), out, scale=1.0, precision=precision)
    for scale in (0.0, -1.0, np.inf, np.nan):
        with pytest.raises(InvalidShapeError, match="scale: found"):
            attend(cache, 0, qkv, DeviceRows.one_each(1), out, scale=scale)
