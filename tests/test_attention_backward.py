"""bx.attention_backward beside float64 gradients, finite differences and torch's autograd."""

import fresh
import numpy as np
import pytest
from attention_cases import same_bits
from attention_op_cases import OPTIONS, ROUNDED, TK, TQ, B, normal, operands, pairs, plain, problem
from reference_attention import attention, attention_gradients

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError

DIFFERENTIABLE = {
    name: option
    for name, option in OPTIONS.items()
    if not option.keys() & {"precision", "return_scores"}
}


def gradient_of_out(q, v, seed=5):
    return normal(*q.shape[:-1], v.shape[-1], seed=seed).astype(q.dtype)


def check(d_out, q, k, v, **options):
    """The gradients on every ISA: close to float64 and the same bits; returns them."""
    arrays = plain(d_out, q, k, v)
    wanted = attention_gradients(*arrays, **options)
    _, scores = attention(*arrays[1:], **options, return_scores="mask")
    largest = max(1.0, np.abs(scores[np.isfinite(scores)]).max(initial=0))
    found = []
    for name in bx.available_isas():
        bx.set_isa(name)
        with bx.DispatchMetrics() as metrics:
            found.append(bx.attention_backward(d_out, q, k, v, **options))
        assert {op for op, *_ in metrics.as_dict()} == {"attention_backward"}
    bx.set_isa("auto")
    assert all(same_bits(found[0], other) for other in found[1:])
    for gradient, exact, operand in zip(found[0], wanted, (q, k, v), strict=True):
        assert (gradient.shape, gradient.dtype) == (operand.shape, operand.dtype)
        near = ROUNDED[operand.dtype.name]
        bound = near * largest * max(1.0, np.abs(exact).max(initial=0))
        np.testing.assert_allclose(*plain(gradient), exact, rtol=near, atol=bound)
    return found[0]


# --- values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", pairs(DIFFERENTIABLE), ids="+".join)
def test_every_pair_of_options(pair):
    (q, k, v), options = problem(OPTIONS[pair[0]] | OPTIONS[pair[1]])
    check(gradient_of_out(q, v), q, k, v, **options)


def test_the_reference_is_the_slope():
    """Central differences of the float64 attention, with everything at once."""
    q, k, v = (x.astype(np.float64) for x in operands(2, 4, 2, 5, 9, 3, 4))
    mask = np.where(np.random.default_rng(1).random((5, 9)) < 0.2, -np.inf, 0.3)
    options = {"mask": mask, "softcap": 2.0, "window": (6, 2), "past_len": 3, "scale": 0.9}
    options |= {"dropout_p": 0.25, "seed": 3}
    d_out = gradient_of_out(q, v)
    arrays = {"q": q, "k": k, "v": v}
    wanted = attention_gradients(d_out, **arrays, **options)
    step = 1e-5
    for name, exact in zip(arrays, wanted, strict=True):
        for i in np.ndindex(arrays[name].shape):
            ends = []
            for change in (step, -step):
                moved = arrays[name].copy()
                moved[i] += change
                ends.append((d_out * attention(**arrays | {name: moved}, **options)).sum())
            assert abs((ends[0] - ends[1]) / (2 * step) - exact[i]) < 1e-8


@pytest.mark.parametrize("hkv", [1, 2, 6])
@pytest.mark.parametrize("causal", [False, True])
def test_against_torch(hkv, causal):
    torch = pytest.importorskip("torch", reason="compares with torch's autograd")
    q, k, v = operands(2, 6, hkv, 70, 70, 16, 16)
    d_out = gradient_of_out(q, v)
    tensors = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (q, k, v)]
    torch.nn.functional.scaled_dot_product_attention(
        *tensors, is_causal=causal, enable_gqa=True
    ).backward(torch.tensor(d_out, dtype=torch.float64))
    found = bx.attention_backward(d_out, q, k, v, causal=causal)
    for gradient, tensor in zip(found, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_many_options_at_once_in_parts(seed):
    """Several blocks and chunks; the parts' gradients add up."""
    rng = np.random.default_rng(seed)
    hkv, share, tq, tk = (int(n) for n in rng.integers([1, 1, 1, 1], [3, 4, 150, 700]))
    q, k, v = operands(1 + seed % 3, hkv * share, hkv, tq, tk, 9 + seed, 5 * seed + 1, seed=seed)
    d_out = gradient_of_out(q, v)
    options = {
        "causal": bool(rng.integers(2)),
        "softcap": float(rng.choice([0, 3.0])),
        "window": tuple(int(n) for n in rng.integers(-1, [600, 100])),
        "dropout_p": float(rng.choice([0, 0.1])),
        "seed": seed,
        "mask": rng.random((tq, tk)) < 0.8,
        "past_len": int(rng.integers(0, tk)),
    }
    whole = check(d_out, q, k, v, **options)
    mask, past = options.pop("mask"), options.pop("past_len")
    cut = tq // 3
    for b in range(len(q)):
        dq = [
            bx.attention_backward(
                d_out[b, :, a:z], q[b, :, a:z], k[b], v[b], mask=mask[a:z], past_len=past + a,
                **options,
            )[0]
            for a, z in ((0, cut), (cut, tq))
        ]  # fmt: skip
        assert same_bits([whole[0][b]], [np.concatenate(dq, 1)])
        one = bx.attention_backward(d_out[b], q[b], k[b], v[b], mask=mask, past_len=past, **options)
        assert same_bits([x[b] for x in whole], one)


@pytest.mark.parametrize("dk", [1, 15, 17, 1024])
def test_every_width(dk):
    q, k, v = operands(1, 2, 1, 7, 66, dk, 1025 - dk)
    check(gradient_of_out(q, v), q, k, v)


@pytest.mark.parametrize("tk", [1, 16, 63, 64, 65, 511, 513])
def test_every_length(tk):
    q, k, v = operands(1, 3, 3, 8, tk, 5, 6)
    check(gradient_of_out(q, v), q, k, v, causal=True, past_len=max(tk - 8, 0))


@pytest.mark.parametrize(
    "sizes",
    [{"b": 0}, {"hq": 0, "hkv": 0}, {"tq": 0}, {"tk": 0}, {"dv": 0}, {"tq": 0, "tk": 0}],
    ids=str,
)
def test_empty_sizes(sizes):
    q, k, v = operands(**sizes)
    for gradient, x in zip(
        bx.attention_backward(gradient_of_out(q, v), q, k, v, causal=True), (q, k, v), strict=True
    ):
        assert gradient.shape == x.shape
        assert not gradient.any()


# --- layouts -----------------------------------------------------------------------------------


def test_views_give_the_bits_of_copies():
    q, k, v = operands(hq=4, hkv=2, tq=40, tk=80, dk=16, dv=16)
    d_out = gradient_of_out(q, v)
    wanted = bx.attention_backward(d_out, q, k, v)
    for view in (
        [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (d_out, q, k, v)],
        [np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (d_out, q, k, v)],
        [np.repeat(np.repeat(x, 2, 2), 2, 3)[:, :, ::2, ::2] for x in (d_out, q, k, v)],
    ):
        assert same_bits(wanted, bx.attention_backward(*view))


def test_broadcast_operands_get_the_sum():
    q, k, v = operands(b=6, tq=9, tk=20)
    d_out = gradient_of_out(q, v)
    _, dk, dv = bx.attention_backward(d_out, q, np.repeat(k[:1], 6, 0), np.repeat(v[:1], 6, 0))
    for shared in ((k[:1], v[:1]), (k[0], v[0])):
        dq, dk_sum, dv_sum = bx.attention_backward(d_out, q, *shared)
        assert dq.shape == q.shape
        assert (dk_sum.shape, dv_sum.shape) == (shared[0].shape, shared[1].shape)
        np.testing.assert_allclose(dk_sum.reshape(k.shape[1:]), dk.sum(0), atol=1e-5)
        np.testing.assert_allclose(dv_sum.reshape(v.shape[1:]), dv.sum(0), atol=1e-5)
    lead = [x.reshape(2, 3, *x.shape[1:]) for x in (d_out, q, k, v)]
    whole = bx.attention_backward(d_out, q, k, v)
    for found, x in zip(bx.attention_backward(*lead), whole, strict=True):
        assert found.tobytes() == x.tobytes()


def test_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = [x.astype(ml_dtypes.bfloat16) for x in operands()]
    d_out = gradient_of_out(arrays[0], arrays[2])
    found = bx.attention_backward(d_out, *arrays)
    wide = bx.attention_backward(*(x.astype(np.float32) for x in (d_out, *arrays)))
    assert [x.dtype for x in found] == [arrays[0].dtype] * 3
    assert same_bits(found, [x.astype(ml_dtypes.bfloat16) for x in wide])


# --- what is hidden stays hidden ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_from_hidden_keys_or_rows(isa, bad):
    q, k, v = operands(hq=4, hkv=2, tq=70, tk=140)
    d_out = gradient_of_out(q, v)
    rng = np.random.default_rng(5)
    keys, rows = rng.random(140) < 0.4, rng.random(70) < 0.3
    spoilt = [x.copy() for x in (d_out, q, k, v)]
    for x, hidden in zip(spoilt, (rows, rows, keys, keys), strict=True):
        x[:, :, hidden] = bad
    mask = ~(rows[:, None] | keys)
    for options in ({"mask": mask}, {"mask": np.where(mask, 0.5, -np.inf), "softcap": 2.0}):
        wanted = bx.attention_backward(d_out, q, k, v, **options)
        found = bx.attention_backward(*spoilt, **options)
        assert same_bits(found, wanted)
        assert all(np.isfinite(x).all() for x in found)
        assert not found[0][:, :, rows].any()
        assert not any(x[:, :, keys].any() for x in found[1:])


def test_nan_shows_where_it_is_seen_and_nowhere_else(isa):
    q, k, v = operands(b=1, hq=2, hkv=2, tq=100, tk=100)
    d_out = gradient_of_out(q, v)
    clean = bx.attention_backward(d_out, q, k, v, causal=True)
    v[0, 1, 60, 3] = np.nan
    dq, dk, _ = bx.attention_backward(d_out, q, k, v, causal=True)
    assert np.isnan(dq[0, 1, 60:]).all()
    assert np.isnan(dk[0, 1]).all()  # the rows from 60 on see every key before them
    assert same_bits([dq[:, :, :60], dk[:, :1]], [clean[0][:, :, :60], clean[1][:, :1]])


def test_rows_that_see_nothing_have_no_gradient():
    q, k, v = operands()
    d_out = gradient_of_out(q, v)
    for options in ({"kv_lengths": [0, 0]}, {"window": (0, 0), "past_len": TK}):
        assert not any(x.any() for x in bx.attention_backward(d_out, q, k, v, **options))


# --- one answer everywhere ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_threads_do_not_change_bits(threads, n):
    q, k, v = operands(b=2, hq=6, hkv=2, tq=90, tk=700, dk=64, dv=64)
    d_out = gradient_of_out(q, v)
    bx.set_num_threads(1)
    wanted = bx.attention_backward(d_out, q, k, v, causal=True, past_len=600)
    bx.set_num_threads(n)
    assert same_bits(wanted, bx.attention_backward(d_out, q, k, v, causal=True, past_len=600))


def test_every_thread_takes_part(until_threads):
    q, k, v = operands(1, 2, 2, 400, 400, 64, 64)
    d_out = gradient_of_out(q, v)
    bx.set_isa("scalar")
    until_threads(2, lambda: bx.attention_backward(d_out, q, k, v))
    bx.set_isa("auto")


# --- memory ------------------------------------------------------------------------------------


def test_peak_memory_is_linear():
    """VmHWM of a fresh process: a few numbers a query beside the gradients."""
    code = """
import numpy as np, bitnet_ext as bx
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
t = 16384
q = np.ones((1, 8, t, 16), np.float32)
kv = np.ones((1, 1, t, 16), np.float32)
bx.attention_backward(q[:, :, :64], q[:, :, :64], kv[:, :, :64], kv[:, :, :64])
start = peak()
found = bx.attention_backward(q, q, kv, kv, causal=True, window=(100, 0))
print(peak() - start - sum(x.nbytes for x in found) - 8 * t * 16)
"""
    # Scores alone would be 8 GiB; dk is summed in place, so nothing is kept by block.
    assert int(fresh.output(code)) < 4 << 20


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_out": np.zeros((B, 4, TQ, 23), np.float32)}, "d_out: found"),
        ({"d_out": np.zeros((B, 4, TQ, 24))}, "d_out: found float64"),
        ({"k": np.zeros((B, 3, TK, 24), np.float32)}, "multiple of Hkv"),
        ({"past_len": 1, "kv_lengths": [5, 5]}, "past_len: found 1 together with kv_lengths"),
        ({"dropout_p": 0.1}, "seed: found None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(change, message):
    q, k, v = operands()
    arguments = {"d_out": gradient_of_out(q, v), "q": q, "k": k, "v": v} | change
    with pytest.raises(InvalidShapeError, match=message):
        bx.attention_backward(**arguments)
