"""MultiHeadAttention against its float64 definition; chunks and caches change no bit."""

import itertools

import numpy as np
import pytest
from attention_cases import same_bits
from multi_head_cases import (
    ALL_PAIRS,
    B,
    E,
    H,
    S,
    T,
    call,
    definition,
    first_sequence,
    module,
    normal,
    problem,
    tables,
)
from reference_attention import multi_head

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError


def assert_close(found, wanted):
    """Within 1e-6, absolute or relative to the largest; float16 is rounded once more."""
    rounded = 2**-11 if found.dtype == np.float16 else 0
    bound = 1e-6 * max(1.0, np.abs(wanted).max(initial=0))
    np.testing.assert_allclose(found, wanted, rtol=1e-6 + rounded, atol=bound)


# --- the eight cases ---------------------------------------------------------------------------


def test_small_self_attention(isa):
    mha, state = module()
    x = normal(B, S, E)
    assert_close(mha(x), multi_head(state, x))


def test_cross_attention(isa):
    mha, state = module()
    x, other = normal(B, S, E), normal(B, T, E)
    assert_close(mha(x, other), multi_head(state, x, other))


@pytest.mark.parametrize("sizes", [{"d_k": 5, "d_v": 13}, {"d_v": 3, "out_dim": 40}], ids=str)
def test_keys_and_values_of_other_widths(sizes):
    mha, state = module(**sizes)
    x = normal(B, S, E)
    assert mha(x).shape == (B, S, sizes.get("out_dim", E))
    assert_close(mha(x), multi_head(state, x))


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_kv_heads_are_shared(kv_heads):
    mha, state = module(kv_heads=kv_heads)
    x = normal(B, S, E)
    assert_close(mha(x), multi_head(state, x))
    repeated = {n: np.repeat(w, H // kv_heads, 0) for n, w in state.items() if n in ("w_k", "w_v")}
    full, _ = module()
    full.load_state_dict(state | repeated)
    assert same_bits([mha(x)], [full(x)])


@pytest.mark.parametrize("first", [False, True])
def test_a_cache_is_filled_and_used(first):
    mha, state = module()
    x, other, later = normal(B, S, E), normal(B, T, E), normal(B, 4, E, seed=3)
    filled = mha(x, other, cache_kv=True, only_cache_first_head_kv=first)
    assert same_bits([filled], [mha(x, other)])
    assert mha.cache_length == T
    used = mha(later, use_cached_kv=True)
    assert_close(used, multi_head(state, later, other, first_head=first))
    assert same_bits([used], [mha(later, other, reuse_first_head_kv=first)])
    assert same_bits([used], [mha(later, x, use_cached_kv=True)])  # x_kv takes no part
    mha(later, cache_kv=True)
    assert mha.cache_length == 4
    mha.clear_cache()
    assert mha.cache_length == 0


def test_first_head_of_a_cache_that_has_them_all():
    mha, state = module(kv_heads=2)
    other, later = normal(B, T, E), normal(B, 4, E, seed=3)
    mha(other, cache_kv=True)
    used = mha(later, use_cached_kv=True, reuse_first_head_kv=True)
    assert_close(used, multi_head(state, later, other, first_head=True))
    assert_close(mha(later, use_cached_kv=True), multi_head(state, later, other))  # none was lost


def test_streaming_gives_the_bits_of_the_whole():
    mha, state = module(kv_heads=2)
    x, rope = normal(2, 40, E), tables(40, 3)
    whole = mha(x, causal=True, rope=rope)
    assert_close(whole, multi_head(state, x, causal=True, rope=rope))
    for cuts in ([0, 1, 2, 3, 40], [0, 39, 40], list(range(41))):
        mha.clear_cache()
        parts = [
            mha(x[:, a:z], causal=True, rope=rope, append_kv=True)
            for a, z in itertools.pairwise(cuts)
        ]
        assert mha.cache_length == 40
        assert same_bits([np.concatenate(parts, 1)], [whole])


def test_large_batch_with_dropout():
    mha, state = module(dropout_p=0.3)
    x = normal(50, 6, E)
    assert same_bits([mha(x, seed=5)], [mha(x)])  # not in training
    found = mha(x, training=True, seed=2**64 - 7)
    seeds = [(2**64 - 7 + b) % 2**64 for b in range(50)]
    assert_close(found, multi_head(state, x, dropout_p=0.3, seed=np.array(seeds, np.uint64)))
    assert not same_bits([mha(x, training=True)], [mha(x, training=True)])


def test_first_head_for_all():
    mha, state = module()
    x, other = normal(B, S, E), normal(B, T, E)
    found = mha(x, other, reuse_first_head_kv=True)
    assert_close(found, multi_head(state, x, other, first_head=True))


# --- options together --------------------------------------------------------------------------


@pytest.mark.parametrize("pair", ALL_PAIRS, ids="+".join)
def test_every_pair_of_options(pair):
    mha, state, x, options = problem(pair, dropout_p=0.2)
    found = call(mha, x, **options)
    assert found.dtype == x.dtype
    assert_close(found, multi_head(state, x, **definition(options, mha)))
    for factor in (1, 2, 3, 100):
        options["save_peak_mem_factor"] = factor
        assert same_bits([found], [call(mha, x, **options)])
    one = call(mha, x[:1], **first_sequence(options))  # chunks of the sequence now
    assert same_bits([found[:1]], [one])


@pytest.mark.parametrize("pair", [p for p in ALL_PAIRS if "cached" in "+".join(p)], ids="+".join)
def test_every_option_leaves_its_cache(pair):
    mha, state, x, options = problem(pair, dropout_p=0.2)
    call(mha, x, **options)
    first = options.get("only_cache_first_head_kv") or options.get("reuse_first_head_kv", False)
    kept = {name: options[name] for name in ("x_kv", "rope") if name in options}
    used = mha(x, use_cached_kv=True, rope=kept.get("rope"))
    wanted = multi_head(state, x, **{"x_kv": x} | kept, scale=mha.softmax_scale, first_head=first)
    assert_close(used, wanted)


def test_leading_axes_come_back():
    mha, _ = module()
    x = normal(6, S, E)
    mask = np.random.default_rng(0).random((6, 1, S, S)) < 0.7
    flat = mha(x, mask=mask)
    for lead in ((2, 3), (1, 6), (6, 1, 1)):
        found = mha(x.reshape(*lead, S, E), mask=mask.reshape(*lead, 1, S, S))
        assert same_bits([found.reshape(flat.shape)], [flat])
    assert same_bits([mha(x[0])], [mha(x[:1])[0]])


@pytest.mark.parametrize("shape", [(0, S, E), (B, 0, E), (0, 0, E)], ids=str)
def test_empty_sizes(shape):
    mha, _ = module()
    assert mha(np.zeros(shape, np.float32)).shape == shape


def test_half_precision_comes_back():
    mha, state = module()
    x = normal(B, S, E).astype(np.float16)
    found = mha(x)
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, multi_head(state, x), atol=2e-3)


def test_state_goes_in_and_out():
    mha, state = module()
    found = mha.state_dict()
    assert same_bits([found[n] for n in state], list(state.values()))
    found["w_q"][:] = 0  # copies
    state["w_k"][:] = 0
    assert mha.state_dict()["w_q"].any()
    assert mha.state_dict()["w_k"].any()


def test_an_error_leaves_cache_and_weights_alone():
    mha, state = module()
    x, more = normal(B, S, E), normal(B, 1, E)
    mha(x, append_kv=True)
    wanted = mha(more, use_cached_kv=True)
    with pytest.raises(InvalidShapeError):
        mha(x, append_kv=True, mask=np.ones((7, 7), bool))
    with pytest.raises(InvalidShapeError):
        mha.load_state_dict(state | {"w_q": state["w_q"][:1]})
    assert mha.cache_length == S
    assert same_bits([mha(more, use_cached_kv=True)], [wanted])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"x": np.zeros((B, S, E + 1), np.float32)}, "x: found"),
        ({"x": np.zeros((B, S, E))}, "x: found float64"),
        ({"x": np.zeros(E, np.float32)}, "x: found"),
        ({"x_kv": np.zeros((B + 1, S, E), np.float32)}, "x_kv: found"),
        ({"use_cached_kv": True}, "cache: found none"),
        ({"cache_kv": True, "append_kv": True}, "found more than one"),
        ({"only_cache_first_head_kv": True}, "wanted together with cache_kv"),
        ({"save_peak_mem_factor": 0}, "save_peak_mem_factor: found 0"),
        ({"mask": np.ones((5, 1, S, S), bool)}, "mask: found"),
        ({"mask": np.ones((S + 1, S), bool)}, "mask: found"),
        ({"rope": tables(3, 2)}, "rope: found"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(options, message):
    mha, _ = module()
    with pytest.raises(InvalidShapeError, match=message):
        mha(**{"x": normal(B, S, E)} | options)


def test_refuses_sizes_and_states_that_do_not_fit():
    for sizes in ((E, 5, {}), (E, 4, {"kv_heads": 3}), (E, 0, {"d_k": 4}), (E, 0, {}), (0, 4, {})):
        with pytest.raises(InvalidShapeError):
            bx.MultiHeadAttention(*sizes[:2], **sizes[2])
    mha = bx.MultiHeadAttention(E, H, out_dim=E + 1)
    with pytest.raises(InvalidShapeError, match="state: found no weights"):
        mha(normal(B, S, E))
    with pytest.raises(InvalidShapeError, match="state: found"):
        mha.load_state_dict({"w_q": normal(H, 8, E)})
    mha, _ = module(out_dim=E + 1)
    with pytest.raises(InvalidShapeError, match="add_input: found out_dim 33"):
        mha(normal(B, S, E), add_input=True)
    mha, _ = module()
    mha(normal(B, S, E), append_kv=True)
    with pytest.raises(InvalidShapeError, match="cache: found one of 3 sequences"):
        mha(normal(1, S, E), use_cached_kv=True)
    with pytest.raises(InvalidShapeError, match="cache: found 4 kv heads, wanted 1"):
        mha(normal(B, S, E), append_kv=True, reuse_first_head_kv=True)
