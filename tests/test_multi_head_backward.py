"""MultiHeadAttention.backward against its float64 definition; parts change no bit."""

import fresh
import numpy as np
import pytest
from attention_cases import same_bits
from multi_head_cases import (
    ALL_PAIRS,
    B,
    E,
    S,
    T,
    call,
    definition,
    first_sequence,
    module,
    normal,
    problem,
    tables,
)  # fmt: skip
from reference_attention import multi_head, multi_head_gradients

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError


def run(mha, d_out, x, **options):
    """The gradients of one call, as a flat list."""
    call(mha, x, **options | {"training": True})
    found = mha.backward(d_out)
    assert list(found.weights) == ["w_q", "w_k", "w_v", "w_out"]
    return [a for a in (found.x, found.x_kv, *found.weights.values()) if a is not None]


def assert_close(found, wanted):
    x, x_kv, weights = wanted
    exact = [a for a in (x, x_kv, *weights.values()) if a is not None]
    for a, b in zip(found, exact, strict=True):
        rounded = 2**-11 if a.dtype == np.float16 else 0
        bound = 2e-6 * max(1.0, np.abs(b).max(initial=0))
        np.testing.assert_allclose(a, b, rtol=2e-6 + rounded, atol=bound)


@pytest.mark.parametrize("pair", ALL_PAIRS, ids="+".join)
def test_every_pair_of_options(pair):
    mha, state, x, options = problem(pair, dropout_p=0.2)
    d_out = normal(B, S, mha.out_dim, seed=4)
    found = run(mha, d_out, x, **options)
    grad_x, grad_kv, weights = multi_head_gradients(state, d_out, x, **definition(options, mha))
    if "cached" in options:  # constants
        grad_kv = None
        weights |= {name: np.zeros_like(state[name]) for name in ("w_k", "w_v")}
    assert_close(found, (grad_x, grad_kv, weights))
    for factor in (1, 2, 3, 100):
        assert same_bits(found, run(mha, d_out, x, **options | {"save_peak_mem_factor": factor}))
    one = first_sequence(options)
    whole = run(mha, d_out[:1], x[:1], **one | {"save_peak_mem_factor": None})
    assert same_bits([whole[0]], [found[0][:1]])
    for factor in (1, 2, 3, 100):  # parts of the sequence
        parts = run(mha, d_out[:1], x[:1], **one | {"save_peak_mem_factor": factor})
        assert same_bits(whole, parts)


@pytest.mark.parametrize("sizes", [{"d_k": 5, "d_v": 13}, {"d_v": 3, "out_dim": 40}], ids=str)
def test_every_isa_and_width(sizes):
    x, other = normal(B, S, E), normal(B, T, E)
    mha, state = module(**sizes)
    d_out = normal(B, S, mha.out_dim, seed=4)
    found = []
    for name in bx.available_isas():
        bx.set_isa(name)
        found.append(run(mha, d_out, x, x_kv=other))
    bx.set_isa("auto")
    assert all(same_bits(found[0], a) for a in found[1:])
    assert_close(found[0], multi_head_gradients(state, d_out, x, other))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_threads_do_not_change_bits(threads, n):
    x, d_out = normal(2, 90, 96), normal(2, 90, 96, seed=4)
    mha, _ = module(96, 6)
    bx.set_num_threads(1)
    wanted = run(mha, d_out, x, causal=True)
    bx.set_num_threads(n)
    assert same_bits(wanted, run(mha, d_out, x, causal=True))


def test_the_reference_is_the_slope():
    x, other, d_out = (normal(2, n, E, seed=4).astype(np.float64) for n in (3, 5, 3))
    _, state = module(kv_heads=2)
    arrays = {"x": x, "x_kv": other} | {n: w.astype(np.float64) for n, w in state.items()}
    options = {"rope": tables(9, 2), "causal": True, "past": 2, "add_input": True}

    def loss(**changed):
        every = arrays | changed
        weights = {name: every[name] for name in state}
        return (d_out * multi_head(weights, every["x"], every["x_kv"], **options)).sum()

    grad_x, grad_kv, weights = multi_head_gradients(state, d_out, x, other, **options)
    rng, step = np.random.default_rng(0), 1e-5
    for name, exact in ({"x": grad_x, "x_kv": grad_kv} | weights).items():
        for i in rng.integers(0, exact.size, 20):
            ends = []
            for change in (step, -step):
                moved = arrays[name].copy()
                moved.flat[i] += change
                ends.append(loss(**{name: moved}))
            assert abs((ends[0] - ends[1]) / (2 * step) - exact.flat[i]) < 1e-7


def test_against_torch():
    torch = pytest.importorskip("torch", reason="compares with torch's autograd")
    x, d_out = normal(B, S, E), normal(B, S, E, seed=4)
    mha, state = module()
    w = {n: torch.tensor(a, dtype=torch.float64, requires_grad=True) for n, a in state.items()}
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    q, k, v = (torch.einsum("bse,hde->bhsd", t, w[n]) for n in ("w_q", "w_k", "w_v"))
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.einsum("bhsd,hde->bse", heads, w["w_out"]).backward(torch.tensor(d_out).double())
    found = run(mha, d_out, x, causal=True)
    for a, tensor in zip(found, (t, *w.values()), strict=True):
        np.testing.assert_allclose(a, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)


def test_cached_keys_are_constants():
    mha, state = module()
    x, other, d_out = normal(B, S, E), normal(B, T, E), normal(B, S, E, seed=4)
    mha(other, cache_kv=True)
    mha(x, use_cached_kv=True, training=True)
    found = mha.backward(d_out)
    wanted = multi_head_gradients(state, d_out, x, other)
    np.testing.assert_allclose(found.x, wanted[0], atol=2e-6 * np.abs(wanted[0]).max())
    assert found.x_kv is None
    assert not found.weights["w_k"].any()
    assert not found.weights["w_v"].any()


def test_appended_keys_have_gradients_and_those_before_none():
    mha, _ = module()
    whole, d_out = normal(2, 30, E), normal(2, 30, E, seed=4)
    d_out[:, :18] = 0
    full = run(mha, d_out, whole, causal=True, rope=tables(30, 4))
    mha.clear_cache()
    mha(whole[:, :18], causal=True, rope=tables(30, 4), append_kv=True)
    mha(whole[:, 18:], causal=True, rope=tables(30, 4), append_kv=True, training=True)
    found = mha.backward(d_out[:, 18:])
    # A key's gradient does not depend on whether the keys before it are constants.
    np.testing.assert_allclose(found.x, full[0][:, 18:], rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.weights["w_q"], full[1], rtol=0, atol=1e-5)


def test_leading_axes_and_half_precision_come_back():
    mha, _ = module()
    x, d_out = normal(6, S, E), normal(6, S, E, seed=4)
    flat = run(mha, d_out, x)
    found = run(mha, d_out.reshape(2, 3, S, E), x.reshape(2, 3, S, E))
    assert found[0].shape == (2, 3, S, E)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(flat, found, strict=True))
    halves = [a.astype(np.float16) for a in (d_out, x)]
    half, wide = run(mha, *halves), run(mha, *(a.astype(np.float32) for a in halves))
    assert half[0].dtype == np.float16
    assert same_bits(half, [wide[0].astype(np.float16), *wide[1:]])


@pytest.mark.parametrize("shape", [(0, S, E), (B, 0, E), (0, 0, E)], ids=str)
def test_empty_sizes(shape):
    mha, _ = module()
    empty = np.zeros(shape, np.float32)
    found = run(mha, empty, empty)
    assert found[0].shape == shape
    assert not any(a.any() for a in found)


def test_a_call_can_be_differentiated_again():
    mha, state = module(dropout_p=0.5)
    x, d_out = normal(B, S, E), normal(B, S, E, seed=4)
    mha(x, training=True)  # a seed of its own
    first = mha.backward(d_out)
    mha(normal(1, 2, E))  # not in training: forgets nothing
    again = mha.backward(d_out)
    assert same_bits([first.x, *first.weights.values()], [again.x, *again.weights.values()])
    with pytest.raises(InvalidShapeError, match="d_out: found float32"):
        mha.backward(d_out[:1])
    with pytest.raises(InvalidShapeError, match="d_out: found float64"):
        mha.backward(d_out.astype(np.float64))
    mha.load_state_dict(state)
    with pytest.raises(InvalidShapeError, match="backward: found no call"):
        mha.backward(d_out)


def test_parts_need_less_memory():
    """VmHWM of fresh processes: eight parts of the sequences need no more than half."""
    code = """
import numpy as np, bitnet_ext as bx
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
mha = bx.MultiHeadAttention(64, 8, d_k=64)
shapes = {"w_q": (8, 64, 64), "w_k": (8, 64, 64), "w_v": (8, 64, 64), "w_out": (8, 64, 64)}
mha.load_state_dict({n: np.full(s, 0.01, np.float32) for n, s in shapes.items()})
x = np.ones((16, 512, 64), np.float32)
mha(x[:1, :8], training=True)
mha.backward(x[:1, :8])
start = peak()
mha(x, training=True, save_peak_mem_factor=FACTOR)
mha.backward(x)
print(peak() - start)
"""
    whole, parts = (int(fresh.output(code.replace("FACTOR", n))) for n in ("None", "8"))
    assert parts < whole / 2, (whole, parts)


# --- the sums beneath --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 1), (5, 7, 15), (130, 13, 97), (300, 50, 64)])
def test_sums_of_products(isa, shape):
    terms, outputs, width = shape
    a, b, start = normal(terms, outputs), normal(terms, width), normal(outputs, width, seed=2)
    whole = start.copy()
    with bx.DispatchMetrics() as metrics:
        _core.sum_products(a, b, whole)
    assert {op for op, *_ in metrics.as_dict()} == {"sum_products"}
    exact = start + a.T.astype(np.float64) @ b
    assert (np.abs(whole - exact) <= 3e-7 * (np.abs(start) + np.abs(a).T @ np.abs(b))).all()
    parts, cut = start.copy(), terms // 3
    _core.sum_products(np.asfortranarray(a[:cut]), b[:cut], parts)
    _core.sum_products(np.ascontiguousarray(a[cut:, ::-1])[:, ::-1], b[cut:], parts)
    assert same_bits([whole], [parts])


@pytest.mark.parametrize(
    ("a", "b", "out", "message"),
    [
        (np.zeros((3, 2)), np.zeros((3, 4), "f4"), np.zeros((2, 4), "f4"), "a: found"),
        (np.zeros((3, 2), "f4"), np.zeros((2, 4), "f4"), np.zeros((2, 4), "f4"), "out: found"),
        (np.zeros((3, 2), "f4"), np.zeros((3, 4), "f4"), np.zeros((2, 5), "f4"), "out: found"),
    ],
)
def test_sums_refuse_what_does_not_fit(a, b, out, message):
    with pytest.raises(InvalidShapeError, match=message):
        _core.sum_products(a, b, out)
