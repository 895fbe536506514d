"""bx.attention beside its float64 definition, with every option, on every ISA."""

import fresh
import numpy as np
import pytest
from attention_cases import same_bits
from attention_op_cases import (
    OPTIONS,
    ROUNDED,
    TK,
    TQ,
    B,
    assert_close,
    normal,
    operands,
    pairs,
    plain,
    problem,
)
from reference_attention import attention, kept_weights, philox

import bitnet_ext as bx
from bitnet_ext import _core


def check(q, k, v, **options):
    """The op on every ISA: close to the definition and the same bits; returns its output."""
    kind = options.pop("return_scores", None)
    exact = plain(q, k, v)
    wanted = attention(*exact, **options)
    _, masked = attention(*exact, **options, return_scores="mask")
    found = []
    for name in bx.available_isas():
        bx.set_isa(name)
        with bx.DispatchMetrics() as metrics:
            found.append(bx.attention(q, k, v, **options, return_scores=kind))
        assert {op for op, *_ in metrics.as_dict()} == {"attention"}
    bx.set_isa("auto")
    found = found if kind else [(out,) for out in found]
    assert all(same_bits(found[0], other) for other in found[1:])
    out = found[0][0]
    assert out.shape == (*q.shape[:-1], v.shape[-1])
    assert out.dtype == q.dtype
    (values,) = plain(out)
    if q.dtype != np.float32:  # the result is rounded once
        unit = 1e-3 if options.get("precision") == "int8" else 1e-5  # a weight's code, at most
        np.testing.assert_allclose(values, wanted, rtol=ROUNDED[q.dtype.name], atol=unit)
    else:
        grown = 1 / (1 - options.get("dropout_p", 0.0))
        slack = 0
        if options.get("precision") == "int8":
            slack = attention(*exact, **options, return_scores="slack")[1]
        near = np.clip(values, wanted - slack, wanted + slack)  # itself where it is as near
        assert_close(values - near + wanted, wanted, exact[2] * grown, masked)
    if kind:
        _, scores = attention(*exact, **options, return_scores=kind)
        assert_close(
            *plain(found[0][1]), scores, np.ones(1), scores if kind != "softmax" else masked
        )
    return out


# --- the cases that every attention library has ------------------------------------------------


def test_self_attention():
    check(*operands(b=1, hq=2, hkv=2, tq=5, tk=5, dk=8, dv=8))


def test_cross_attention():
    check(*operands(hq=2, hkv=2, tq=7, tk=200))


def test_values_of_another_width():
    check(*operands(dk=16, dv=40))
    check(*operands(dk=40, dv=3))


@pytest.mark.parametrize("hkv", [1, 2, 4])
def test_query_heads_share_kv_heads(hkv):
    q, k, v = operands(hq=8, hkv=hkv, tq=70, tk=70)
    found = check(q, k, v, causal=True)
    repeated = [np.repeat(x, 8 // hkv, 1) for x in (k, v)]
    assert same_bits([found], [bx.attention(q, *repeated, causal=True)])


def test_filling_then_using_a_cache_gives_the_bits_of_the_whole():
    q, k, v = operands(tq=75)
    whole = check(q, k, v, causal=True)
    first = bx.attention(q[:, :, :40], k[:, :, :40], v[:, :, :40], causal=True)
    rest = bx.attention(q[:, :, 40:], k, v, causal=True, past_len=40)
    assert same_bits([whole], [np.concatenate([first, rest], 2)])


@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_streaming_token_by_token_gives_the_bits_of_the_whole(precision):
    q, k, v = operands(b=1, hq=2, hkv=1, tq=70, tk=70)
    options = {"causal": True, "precision": precision}
    whole = bx.attention(q, k, v, **options)
    for t in range(70):
        n = t + 1
        one = bx.attention(q[:, :, t:n], k[:, :, :n], v[:, :, :n], past_len=t, **options)
        assert same_bits([whole[:, :, t:n]], [one])
        padded = bx.attention(q[:, :, t:n], k, v, kv_lengths=[n], **options)
        assert same_bits([one], [padded])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_few_queries_get_the_bits_of_many(isa, rows, dtype):
    """They read keys and values in place, many pack them: chunks, windows, masks, scores, NaN."""
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    rng = np.random.default_rng(rows)
    for share, dk, dv in ((1, 16, 64), (2, 33, 150)):
        q, k, v = (x.astype(dtype) for x in operands(1, 2 * share, 2, 40, 590, dk, dv))
        mask = rng.random((40, 590)) < 0.8
        hidden = rng.random(590) < 0.3
        k2, v2 = k.copy(), v.copy()
        k2[:, :, hidden], v2[:, :, hidden] = np.nan, np.inf
        for kv, options in (
            ((k, v), {}),
            ((k, v), {"causal": True, "past_len": 550}),
            ((k, v), {"window": (30, 5), "past_len": 500, "softcap": 2.0}),
            ((k, v), {"dropout_p": 0.3, "seed": 5, "mask": mask}),
            ((k2, v2), {"mask": mask & ~hidden}),
            ((k, v), {"return_scores": "softmax", "mask": mask.astype(np.float32)}),
        ):
            whole = bx.attention(q, *kv, **options)
            past = options.pop("past_len", 0)
            for first in (0, 40 - rows):
                part = slice(first, first + rows)
                cut = options | ({"mask": options["mask"][part]} if "mask" in options else {})
                few = bx.attention(q[:, :, part], *kv, past_len=past + first, **cut)
                pairs = zip(whole, few, strict=True) if "return_scores" in cut else [(whole, few)]
                for a, b in pairs:
                    assert np.isfinite(b.astype(np.float32)).all()
                    assert same_bits([a[:, :, part]], [b])


def test_large_batch_with_dropout():
    q, k, v = operands(b=40, hq=2, hkv=1, tq=6, tk=9, dk=4, dv=4)
    check(q, k, v, dropout_p=0.25, seed=7)
    check(q, k, v, dropout_p=0.25, seed=np.arange(40))


# --- every pair of options ---------------------------------------------------------------------


@pytest.mark.parametrize("pair", pairs(OPTIONS), ids="+".join)
def test_every_pair_of_options(pair):
    arrays, options = problem(OPTIONS[pair[0]] | OPTIONS[pair[1]])
    check(*arrays, **options)


@pytest.mark.parametrize("seed", range(12))
def test_many_options_at_once(seed):
    """Random sets of options over several blocks, and the same result in parts."""
    rng = np.random.default_rng(seed)
    hkv, share, tq, tk = (int(n) for n in rng.integers([1, 1, 1, 1], [3, 4, 150, 700]))
    q, k, v = operands(1 + seed % 3, hkv * share, hkv, tq, tk, 9 + seed, 5 * seed + 1, seed=seed)
    options = {
        "causal": bool(rng.integers(2)),
        "softcap": float(rng.choice([0, 3.0])),
        "window": tuple(int(n) for n in rng.integers(-1, [600, 100])),
        "dropout_p": float(rng.choice([0, 0.1])),
        "seed": seed,
        "precision": str(rng.choice(["f32", "int8"])),
    }
    mask = rng.random((tq, tk)) < 0.8
    past = int(rng.integers(0, tk))
    whole = check(q, k, v, mask=mask, past_len=past, **options)
    cut = tq // 3
    for b in range(len(q)):
        parts = [
            bx.attention(q[b, :, a:z], k[b], v[b], mask=mask[a:z], past_len=past + a, **options)
            for a, z in ((0, cut), (cut, tq))
        ]
        assert same_bits([whole[b]], [np.concatenate(parts, 1)])


# --- sizes and layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("dk", [1, 2, 15, 17, 33, 1024])
@pytest.mark.parametrize("precision", ["f32", "int8"])
def test_every_width(dk, precision):
    check(*operands(1, 2, 1, 7, 66, dk, dk), precision=precision)


@pytest.mark.parametrize("tk", [1, 16, 63, 64, 65, 511, 512, 513, 1100])
def test_every_length(tk):
    check(*operands(1, 3, 3, 8, tk, 5, 6))
    check(*operands(1, 3, 1, 8, tk, 5, 6), causal=True, past_len=max(tk - 8, 0))


@pytest.mark.parametrize(
    "sizes",
    [{"b": 0}, {"hq": 0, "hkv": 0}, {"tq": 0}, {"tk": 0}, {"dv": 0}, {"tq": 0, "tk": 0}],
    ids=str,
)
def test_empty_sizes(sizes):
    q, k, v = operands(**sizes)
    for kind in (None, "mask", "softmax"):
        found = bx.attention(q, k, v, causal=True, return_scores=kind)
        out = found[0] if kind else found
        assert out.shape == (*q.shape[:3], v.shape[-1])
        assert not out.any()
        if kind:
            assert found[1].shape == (*q.shape[:3], k.shape[2])


def test_any_leading_axes():
    q, k, v = operands(b=6)
    wanted = bx.attention(q, k, v)
    for lead in ((6,), (2, 3), (1, 6), (3, 1, 2)):
        found = bx.attention(*(x.reshape(lead + x.shape[1:]) for x in (q, k, v)))
        assert found.shape[: len(lead)] == lead
        assert found.tobytes() == wanted.tobytes()
    assert same_bits([bx.attention(q[0], k[0], v[0])], [wanted[0]])
    shared = bx.attention(q, k[:1], v[0])  # one sequence's keys for all
    assert same_bits([shared[4]], [bx.attention(q[4], k[0], v[0])])


def test_views_give_the_bits_of_copies():
    q, k, v = operands(hq=4, hkv=2, tq=40, tk=80, dk=16, dv=16)
    mask = np.random.default_rng(0).random((40, 160)) < 0.7
    mask_t = np.ascontiguousarray(mask[:, ::2].T).T
    wanted = bx.attention(q, k, v, mask=mask[:, ::2])
    views = [
        [np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v)],
        [np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1] for x in (q, k, v)],
        [np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2) for x in (q, k, v)],
        [np.repeat(np.repeat(x, 2, 2), 2, 3)[:, :, ::2, ::2] for x in (q, k, v)],
    ]
    for view in views:
        assert same_bits([wanted], [bx.attention(*view, mask=mask_t)])
    qkv = np.concatenate([x.swapaxes(1, 2).reshape(B, -1)[:, : 40 * 32] for x in (q, k, v)], 1)
    packed = [part.reshape(B, 40, 2, 16).swapaxes(1, 2) for part in np.split(qkv, 3, 1)]
    assert same_bits([bx.attention(*map(np.copy, packed))], [bx.attention(*packed)])


@pytest.mark.parametrize("dtype", ["bool", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 40])
def test_masks_of_any_strides_give_the_bits_of_copies(isa, dtype, rows):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    q, k, v = operands(hq=4, hkv=2, tq=rows, tk=150)
    mask = np.random.default_rng(0).integers(-1, 2, (4, rows, 150)).astype(dtype)
    if dtype != "bool":
        mask[mask < 0] = -np.inf
    views = [
        np.ascontiguousarray(mask.T).T,
        np.repeat(mask, 2, 2)[..., ::2],
        np.ascontiguousarray(mask[..., ::-1])[..., ::-1],
        np.ascontiguousarray(mask.swapaxes(0, 2)).swapaxes(0, 2),
    ]
    for width in (150, 141, 2):  # shorter masks hide the other keys
        for options in ({}, {"precision": "int8"}, {"causal": True, "past_len": 100}):
            wanted = bx.attention(q, k, v, mask=mask[..., :width].copy(), **options)
            for view in views:
                found = bx.attention(q, k, v, mask=view[..., :width], **options)
                assert same_bits([found], [wanted])
    for view in views:
        wanted = bx.attention_backward(q, q, k, v, mask=mask)
        assert same_bits(bx.attention_backward(q, q, k, v, mask=view), wanted)


def test_bfloat16_bits():
    """What the kernels read as bits of bfloat16, which NumPy alone has no name for."""
    whole = operands()
    bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in whole]
    wide = [(x.astype(np.uint32) << 16).view(np.float32) for x in bits]
    outs = []
    for q, k, v in (bits, wide):
        outs.append(np.empty((B, 4, TQ, 24), np.float32))
        mask = np.broadcast_to(np.ascontiguousarray(k[0, 0, :, 0]), (B, 4, TQ, TK))
        rest = (False, 0, -1, -1, 0.25, 0.0, 0.0, False, None, "")
        _core.attention(q, k, v, outs[-1], mask, None, None, *rest)
    assert same_bits(outs[:1], outs[1:])


def test_bfloat16_arrays():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    q, k, v = (x.astype(ml_dtypes.bfloat16) for x in operands())
    mask = normal(TQ, TK).astype(ml_dtypes.bfloat16)
    found = bx.attention(q, k, v, mask=mask)
    assert found.dtype == q.dtype
    wide = bx.attention(*(x.astype(np.float32) for x in (q, k, v)), mask=mask.astype(np.float32))
    assert same_bits([found], [wide.astype(ml_dtypes.bfloat16)])


# --- what the options promise ---------------------------------------------------------------------


def test_dropout_is_the_counter_based_one():
    """The published vectors of Philox4x32-10, and the pattern as the definition draws it."""
    ones = 0xFFFFFFFF
    words = [int(w) for w in philox(0, 0, 0, 0)]
    assert words == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    q, k, v = operands(1, 3, 1, 20, 150, 4, 150)
    v[:] = np.eye(150)
    q[:] = 0  # every weight 1 / 150 / (1 - p)
    out = bx.attention(q, k, v, dropout_p=0.4, seed=ones << 7, past_len=5)
    kept = kept_weights(ones << 7, np.arange(5, 25), 3, 150, 0.4)
    np.testing.assert_array_equal(out[0] > 0, kept)
    np.testing.assert_allclose(out[0][kept], 1 / 150 / 0.6, rtol=1e-6)
    assert abs(kept.mean() - 0.6) < 0.02


def test_int8_stays_within_its_stated_error():
    q, k, v = operands(1, 4, 2, 60, 200, 64, 64)
    _, exact = bx.attention(q, k, v, return_scores="raw")
    _, rounded = bx.attention(q, k, v, return_scores="raw", precision="int8")
    k = np.repeat(k, 2, 1)
    sums = [np.abs(x).sum(-1) for x in (q, k)]
    tops = [np.abs(x).max(-1) for x in (q, k)]
    (q1, k1), (q2, k2) = ([x[..., None], y[..., None, :]] for x, y in (sums, tops))
    bound = 64**-0.5 * ((q1 * k2 + k1 * q2) / 254 + 64 * q2 * k2 / 254**2)
    error = np.abs(exact - rounded)
    assert (error <= bound).all()
    assert 1e-3 < error.max() < 0.1


def test_int8_values_stay_within_their_stated_error():
    """Equal scores, a key far above the others of its block, and outliers among the values."""
    q, k, v = operands(1, 1, 1, 40, 300, 64, 64)
    q[0, 0, ::2] = 0
    q[0, 0, 1::2, 0], k[0, 0, :, 0] = 90, 0
    k[0, 0, ::64, 0] = 0.7
    v[0, 0, 5::7, 3] *= 100
    found, p = bx.attention(q, k, v, precision="int8", return_scores="softmax")
    top = np.abs(v[0, 0]).max(-1)
    weights = p[0, 0].astype(np.float64)
    terms = weights * top
    blocks = [terms[:, i : i + 64] for i in range(0, 300, 64)]
    bound = terms.sum(-1) / 254 + sum(b.max(-1) * b.shape[1] for b in blocks) / 4094
    error = np.abs(found[0, 0] - weights @ v[0, 0]).max(-1)
    assert (error <= 1.001 * bound).all()
    assert error.max() > 0.02 * bound.max()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_int8_shows_a_seen_value_that_is_not_finite_in_its_whole_row(isa, bad):
    q, k, v = operands(1, 2, 1, 70, 70)
    v[0, 0, 40, 3] = bad
    out = bx.attention(q, k, v, causal=True, precision="int8")
    assert np.isfinite(out[:, :, :40]).all()
    assert np.isnan(out[:, :, 40:]).all()


def test_values_are_not_read_past_the_array():
    """Columns 8 to 127 of rows of 128: the last row's end in a page that faults behind it."""
    code = """
import ctypes, mmap
import numpy as np
import bitnet_ext as bx

rows = 64 * 128 * 4
memory = mmap.mmap(-1, rows + mmap.PAGESIZE)
whole = np.frombuffer(memory, np.float32, rows // 4).reshape(1, 1, 64, 128)
guard = ctypes.c_void_p(whole.ctypes.data + rows)
assert ctypes.CDLL(None).mprotect(guard, mmap.PAGESIZE, 0) == 0
rng = np.random.default_rng(0)
whole[:] = rng.standard_normal(whole.shape, np.float32)
q = rng.standard_normal((1, 1, 40, 128), np.float32)
for isa in bx.available_isas():
    bx.set_isa(isa)
    found = bx.attention(q, whole, whole[..., 8:], device="cpu")
    np.testing.assert_array_equal(found, bx.attention(q, whole, whole[..., 8:].copy()))
print("done")
"""
    assert fresh.output(code) == "done"
