"""MultiHeadAttention of arrays on a device: every option, the CPU's bits."""

import itertools

import numpy as np
import pytest
from attention_cases import same_bits
from hot_path import TheHost, hot
from multi_head_cases import OPTIONS, PAIRS, B, E, S, T, first_sequence, module, normal, tables

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError


def there(device, value):
    """Arrays, also those in tuples and dicts, on the device; everything else as it is."""
    if isinstance(value, np.ndarray):
        return device.to_device(value)
    if isinstance(value, tuple):
        return tuple(there(device, part) for part in value)
    if isinstance(value, dict):
        return {name: there(device, part) for name, part in value.items()}
    return value


def check(device, mha, x, **options):
    """The call on the device gives the bits of the call on the host; returns those."""
    mha.clear_cache()
    wanted = mha(x, **options)
    mha.clear_cache()
    found = mha(device.to_device(x), **there(device, options))
    assert device.owns(found)
    assert found.dtype == wanted.dtype
    assert same_bits([device.to_host(found)], [wanted]), options
    return wanted


# --- options -----------------------------------------------------------------------------------


def test_every_pair_of_options(device):
    mha, _ = module(kv_heads=2, dropout_p=0.2)
    for pair in PAIRS:
        options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
        check(device, mha, normal(B, S, E), **options)
        check(device, mha, normal(1, S, E), **first_sequence(options))


@pytest.mark.parametrize(
    "sizes",
    [{"d_k": 5, "d_v": 13}, {"d_v": 3, "out_dim": 40}, {"kv_heads": 1}, {"embed": 6, "heads": 3}],
    ids=str,
)
def test_widths(device, sizes):
    mha, _ = module(**sizes)
    x, other = normal(B, S, mha.embed_dim), normal(B, T, mha.embed_dim)
    check(device, mha, x)
    check(device, mha, x, x_kv=other, causal=True, rope=tables(20, 1))


def test_options_of_the_host(device):
    """Masks and tables of the host are copied to the device."""
    mha, _ = module()
    x = normal(B, S, E)
    for name in ("rope", "mask", "mask-rows", "mask-keys"):
        wanted = mha(x, **OPTIONS[name])
        found = mha(device.to_device(x), **OPTIONS[name])
        assert same_bits([device.to_host(found)], [wanted])
    mask = OPTIONS["mask-rows"]["mask"].astype(np.float64)
    assert same_bits([device.to_host(mha(device.to_device(x), mask=mask))], [mha(x, mask=mask)])


def test_many_rows_and_keys(device):
    mha, _ = module(24, 3, d_k=8, kv_heads=1)
    x = normal(1, 70, 24)
    check(device, mha, x, causal=True)
    check(device, mha, normal(1, 2, 24), x_kv=normal(1, 600, 24))  # split over the keys


@pytest.mark.parametrize("first", [False, True])
def test_a_cache_is_filled_and_used(device, first):
    mha, _ = module()
    x, other, later = normal(B, S, E), normal(B, T, E), normal(B, 4, E, seed=3)
    mha(x, other, cache_kv=True, only_cache_first_head_kv=first)
    wanted = mha(later, use_cached_kv=True)
    with pytest.raises(InvalidShapeError, match="cache: found it on the host, wanted it on a CUDA"):
        mha(device.to_device(later), use_cached_kv=True)
    mha(*there(device, (x, other)), cache_kv=True, only_cache_first_head_kv=first)
    assert mha.cache_length == T
    found = mha(device.to_device(later), use_cached_kv=True)
    assert same_bits([device.to_host(found)], [wanted])
    with pytest.raises(InvalidShapeError, match="cache: found it on a CUDA device, wanted it on"):
        mha(later, append_kv=True)
    assert mha.cache_length == T


def test_first_head_of_a_cache_that_has_them_all(device):
    mha, _ = module(kv_heads=2)
    other, later = normal(B, T, E), normal(B, 4, E, seed=3)
    options = {"use_cached_kv": True, "reuse_first_head_kv": True}
    mha(other, cache_kv=True)
    wanted = mha(later, **options)
    mha(device.to_device(other), cache_kv=True)
    assert same_bits([device.to_host(mha(device.to_device(later), **options))], [wanted])


def test_streaming_gives_the_bits_of_the_whole(device):
    mha, _ = module(kv_heads=2)
    x, rope = normal(2, 40, E), tables(40, 3)
    wanted = mha(x, causal=True, rope=rope)
    on_device, rope = device.to_device(x), there(device, rope)
    for cuts in ([0, 1, 2, 3, 40], [0, 39, 40]):
        mha.clear_cache()
        parts = [
            device.to_host(mha(on_device[:, a:z], causal=True, rope=rope, append_kv=True))
            for a, z in itertools.pairwise(cuts)
        ]
        assert same_bits([np.concatenate(parts, 1)], [wanted])


# --- arrays ------------------------------------------------------------------------------------


def test_any_leading_axes_and_strides(device):
    mha, _ = module()
    x = normal(6, S, E)
    mask = np.random.default_rng(0).random((6, 1, S, S)) < 0.7
    for lead in ((2, 3), (1, 6), (6, 1, 1)):
        check(device, mha, x.reshape(*lead, S, E), mask=mask.reshape(*lead, 1, S, S))
    check(device, mha, x.reshape(2, 3, S, E), mask=mask[:3])
    check(device, mha, x.reshape(2, 3, S, E), mask=mask[:2].reshape(2, 1, 1, S, S))
    check(device, mha, x.reshape(2, 3, S, E), mask=mask[:1])
    check(device, mha, x[0])
    wanted = mha(x[::2, 1:9])
    assert same_bits([device.to_host(mha(device.to_device(x)[::2, 1:9]))], [wanted])


@pytest.mark.parametrize("shape", [(0, S, E), (B, 0, E), (0, 0, E)], ids=str)
def test_empty_sizes(device, shape):
    mha, _ = module()
    check(device, mha, np.zeros(shape, np.float32), cache_kv=True)


def test_half_precision_comes_back(device):
    mha, _ = module()
    x = normal(B, S, E).astype(np.float16)
    assert check(device, mha, x, x_kv=normal(B, T, E), add_input=True).dtype == np.float16


def test_values_that_are_not_finite(device):
    mha, _ = module()
    x = normal(B, S, E)
    x[0, 3, 4], x[1, 5, 6] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        check(device, mha, x, causal=True)


def test_weights_of_the_device(device):
    mha, state = module()
    x = normal(B, S, E)
    wanted = mha(x)
    mha.load_state_dict(there(device, state))
    assert same_bits([mha(x)], [wanted])  # brought to the host
    assert same_bits([device.to_host(mha(device.to_device(x)))], [wanted])
    found = mha.state_dict()
    assert all(device.owns(found[name]) for name in state)
    found["w_q"][...] = 0  # copies
    assert same_bits([device.to_host(a) for a in mha.state_dict().values()], list(state.values()))
    with pytest.raises(InvalidShapeError, match="state: found some on the host"):
        mha.load_state_dict(state | {"w_q": device.to_device(state["w_q"])})


def test_what_does_not_fit(device):
    mha, _ = module()
    x = normal(B, S, E)
    on_device = device.to_device(x)
    bad = [
        ({"x_kv": x}, "x_kv: found it on the host, wanted it on a CUDA device"),
        ({"out": x}, "out: found it on the host"),
        ({"out": on_device[:2]}, "out: found float32"),
        ({"mask": np.ones((S + 1, S), bool)}, "mask: found"),
        ({"mask": np.ones((5, 1, S, S), bool)}, "mask: found"),
        ({"rope": tables(3, 2)}, "rope: found"),
        ({"rope": tables(S, 5)}, "rope: found"),
        ({"use_cached_kv": True}, "cache: found none"),
    ]
    for options, message in bad:
        with pytest.raises(InvalidShapeError, match=message):
            mha(on_device, **options)
    with pytest.raises(InvalidShapeError, match="x_kv: found it on a CUDA device, wanted it on"):
        mha(x, on_device)


# --- memory ------------------------------------------------------------------------------------


@pytest.mark.hot_path
def test_calls_like_the_last_touch_neither_the_host_nor_the_allocator(device, monkeypatch):
    mha, _ = module(kv_heads=2)
    x, other, step = there(device, (normal(B, S, E), normal(B, T, E), normal(B, 1, E)))
    half = device.to_device(normal(B, S, E).astype(np.float16))
    mask, rope = there(device, (OPTIONS["mask"]["mask"], tables(60, 3)))
    out, one = device.empty(x.shape, np.float32), device.empty(step.shape, np.float32)
    half_out = device.empty(x.shape, np.float16)
    append = {"causal": True, "rope": rope, "append_kv": True, "out": one}

    def calls():
        mha(x, mask=mask, rope=rope, add_input=True, out=out)
        mha(x, other, save_peak_mem_factor=2, out=out)
        mha(half, reuse_first_head_kv=True, out=half_out)
        mha(step, use_cached_kv=True, out=one)
        mha(step, **append)

    mha(x, causal=True, rope=rope, append_kv=True)
    mha(x, causal=True, rope=rope, append_kv=True)  # has room for more now
    calls()
    mha(step, **append)
    length = mha.cache_length
    with hot(device, monkeypatch):
        for _ in range(3):
            calls()
        with pytest.raises(TheHost):
            mha(x)
    assert mha.cache_length == length + 3
    assert same_bits(
        [device.to_host(half_out)], [device.to_host(mha(half, reuse_first_head_kv=True))]
    )
    bx.reset_peak_memory("cuda")  # gives the intermediates back
    with hot(device, monkeypatch), pytest.raises(TheHost):
        calls()


def test_a_limit_makes_parts_smaller_and_changes_no_bit(device):
    mha, _ = module(16, 4)
    for shape in ((12, 40, 16), (1, 400, 16)):
        x = normal(*shape)
        wanted, on_device = mha(x), device.to_device(x)
        out = device.empty(x.shape, np.float32)
        mha(on_device[:, :2])  # brings the weights
        bx.reset_peak_memory("cuda")
        before = bx.memory_stats("cuda").current
        mha(on_device, out=out)
        whole = bx.memory_stats("cuda").peak - before
        bx.reset_peak_memory("cuda")
        bx.set_memory_limit(before + int(0.6 * whole), device="cuda")
        try:
            mha(on_device, out=out)
            assert bx.memory_stats("cuda").peak <= before + 0.6 * whole
        finally:
            bx.set_memory_limit(None, device="cuda")
        assert same_bits([device.to_host(out)], [wanted])


def test_shared_kv_heads_take_no_more_memory(device):
    peaks = []
    for kv_heads in (8, 1):
        mha, _ = module(32, 8, kv_heads=kv_heads)
        x = device.to_device(normal(2, 64, 32))
        mha(x[:, :1])
        bx.reset_peak_memory("cuda")
        before = bx.memory_stats("cuda").current
        mha(x)
        peaks.append(bx.memory_stats("cuda").peak - before)
    assert peaks[1] < peaks[0]


# --- gradients ---------------------------------------------------------------------------------


def gradients(device, mha, d_out, x, **options):
    """Those of a call, as a flat list of the host's arrays; on ``device``, or None: the host."""
    mha.clear_cache()
    arrays = (d_out, x, options | {"training": True})
    d_out, x, options = arrays if device is None else (there(device, a) for a in arrays)
    mha(x, **options)
    found = mha.backward(d_out)
    flat = [a for a in (found.x, found.x_kv, *found.weights.values()) if a is not None]
    if device is None:
        return flat
    assert all(device.owns(a) for a in flat)
    return [device.to_host(a) for a in flat]


def check_gradients(device, mha, d_out, x, **options):
    """The gradients on the device have the bits of those on the host."""
    wanted = gradients(None, mha, d_out, x, **options)
    found = gradients(device, mha, d_out, x, **options)
    assert [a.dtype for a in found] == [a.dtype for a in wanted]
    assert same_bits(found, wanted), options


@pytest.mark.parametrize("first", OPTIONS)
def test_gradients_of_every_pair_of_options(device, first):
    for pair in PAIRS:
        if pair[0] == first:
            options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
            dropout = 0.2 if "training" in options else 0.0
            mha, _ = module(kv_heads=2, dropout_p=dropout)
            check_gradients(device, mha, normal(B, S, E, seed=4), normal(B, S, E), **options)


def test_gradients_of_other_sizes(device):
    for sizes in ({"d_k": 5, "d_v": 13}, {"d_v": 3, "out_dim": 40}):
        mha, _ = module(**sizes)
        x, d_out = normal(1, 20, E), normal(1, 20, mha.out_dim, seed=4)
        check_gradients(device, mha, d_out, x, x_kv=normal(1, T, E), save_peak_mem_factor=3)
    mha, _ = module()
    halves = (a.astype(np.float16) for a in (normal(2, 3, S, E, seed=4), normal(2, 3, S, E)))
    check_gradients(device, mha, *halves)
    for shape in ((0, S, E), (B, 0, E)):
        check_gradients(device, mha, np.zeros(shape, np.float32), np.zeros(shape, np.float32))


def test_gradients_behind_a_cache(device):
    mha, _ = module()
    x, d_out = normal(2, 30, E), normal(2, 12, E, seed=4)
    found = []
    for place in (None, device):
        mha.clear_cache()
        options = {"causal": True, "rope": tables(30, 4), "append_kv": True}
        arrays = (x, d_out, options)
        first, grad, options = arrays if place is None else (there(device, a) for a in arrays)
        mha(first[:, :18], **options)
        mha(first[:, 18:], **options, training=True)
        result = mha.backward(grad)
        found.append([np.array(a, subok=False) if place is None else device.to_host(a)
                      for a in (result.x, *result.weights.values())])  # fmt: skip
    assert same_bits(*found)


def test_gradients_in_parts_that_memory_has_room_for(device):
    mha, _ = module(16, 4)
    x, d_out = normal(12, 20, 16), normal(12, 20, 16, seed=4)
    wanted = gradients(None, mha, d_out, x)
    on_device, grad = there(device, (x, d_out))
    mha(on_device, training=True, save_peak_mem_factor=12)
    mha.backward(grad)
    bx.reset_peak_memory("cuda")
    mha(on_device, training=True)
    before = bx.memory_stats("cuda").current
    bx.set_memory_limit(before + 130_000, device="cuda")
    try:
        found = mha.backward(grad)
    finally:
        bx.set_memory_limit(None, device="cuda")
    flat = [device.to_host(a) for a in (found.x, *found.weights.values())]
    assert same_bits(flat, wanted)


def test_what_backward_refuses(device):
    mha, _ = module()
    x = device.to_device(normal(B, S, E))
    mha(x, training=True)
    with pytest.raises(InvalidShapeError, match="d_out: found it on the host, wanted it on a CUDA"):
        mha.backward(normal(B, S, E))
    with pytest.raises(InvalidShapeError, match="d_out: found float32"):
        mha.backward(x[:1])
