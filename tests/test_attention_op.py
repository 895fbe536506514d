"""bx.attention beside its float64 definition: every option, one answer everywhere."""

import itertools

import fresh
import numpy as np
import pytest
from attention_cases import same_bits
from reference_attention import attention, kept_weights, philox

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError

B, TQ, TK = 2, 13, 75


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands(b=B, hq=4, hkv=4, tq=TQ, tk=TK, dk=24, dv=24, dtype=np.float32, seed=0):
    shapes = ((b, hq, tq, dk), (b, hkv, tk, dk), (b, hkv, tk, dv))
    return [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def assert_close(found, wanted, v, scores):
    """Within 1e-6 of the largest value, times the largest score when above 1."""
    finite = [np.abs(a[np.isfinite(a)]).max(initial=0) for a in (v, scores)]
    bound = 1e-6 * finite[0] * max(1.0, finite[1])
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=bound)


def check(q, k, v, **options):
    """The op on every ISA: close to the definition and the same bits; returns its output."""
    kind = options.pop("return_scores", None)
    plain = [np.asarray(x, np.float32) for x in (q, k, v)]
    wanted = attention(*plain, **options)
    _, masked = attention(*plain, **options, return_scores="mask")
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
    assert out.dtype == q.dtype
    half = q.dtype == np.float16  # the result is rounded once
    if half:
        np.testing.assert_allclose(out, wanted, rtol=6e-4, atol=1e-5)
    else:
        grown = 1 / (1 - options.get("dropout_p", 0.0))
        assert_close(out, wanted, plain[2] * grown, masked)
    if kind:
        _, scores = attention(*plain, **options, return_scores=kind)
        assert_close(found[0][1], scores, np.ones(1), scores if kind != "softmax" else masked)
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


def test_streaming_token_by_token_gives_the_bits_of_the_whole():
    q, k, v = operands(b=1, hq=2, hkv=1, tq=70, tk=70)
    whole = bx.attention(q, k, v, causal=True)
    for t in range(70):
        n = t + 1
        one = bx.attention(q[:, :, t:n], k[:, :, :n], v[:, :, :n], causal=True, past_len=t)
        assert same_bits([whole[:, :, t:n]], [one])
        padded = bx.attention(q[:, :, t:n], k, v, causal=True, kv_lengths=[n])
        assert same_bits([one], [padded])


def test_large_batch_with_dropout():
    q, k, v = operands(b=40, hq=2, hkv=1, tq=6, tk=9, dk=4, dv=4)
    check(q, k, v, dropout_p=0.25, seed=7)
    check(q, k, v, dropout_p=0.25, seed=np.arange(40))


# --- every pair of options ---------------------------------------------------------------------

LONG = np.random.default_rng(3)
OPTIONS = {
    "causal": {"causal": True},
    "past": {"past_len": 30},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5},
    "window": {"window": (9, 4)},
    "left": {"window": (66, -1)},
    "lengths": {"kv_lengths": [70, 5]},
    "dropout": {"dropout_p": 0.3, "seed": [-1, 2**40]},
    "int8": {"precision": "int8"},
    "bool": {"mask": LONG.random((B, 4, TQ, TK)) < 0.5},
    "bool-short": {"mask": LONG.random((TQ, 66)) < 0.2},
    "bool-rows": {"mask": LONG.random((B, 1, TQ, 1)) < 0.5},
    "added": {"mask": LONG.standard_normal((B, 1, TQ, TK), np.float32)},
    "added-short": {"mask": np.where(LONG.random((4, 1, 41)) < 0.5, -np.inf, 1).astype("f4")},
    "added-half": {"mask": LONG.standard_normal((TK,), np.float32).astype(np.float16)},
    "added-rows": {"mask": LONG.standard_normal((4, TQ, 1), np.float32)},
    "raw": {"return_scores": "raw"},
    "capped": {"return_scores": "softcap"},
    "masked": {"return_scores": "mask"},
    "softmax": {"return_scores": "softmax"},
    "gqa": {"shape": {"hkv": 2}},
    "mqa-wide": {"shape": {"hkv": 1, "dk": 16, "dv": 70}},
    "half": {"shape": {"dtype": np.float16}},
}
PAIRS = [
    pair
    for pair in itertools.combinations_with_replacement(OPTIONS, 2)
    if pair[0] == pair[1] or not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()
    if set(pair) != {"past", "lengths"}
]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_pair_of_options(pair):
    options = OPTIONS[pair[0]] | OPTIONS[pair[1]]
    check(*operands(**options.pop("shape", {})), **options)


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


# --- what is hidden stays hidden ---------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nothing_leaks_from_behind_a_mask(isa, bad):
    q, k, v = operands(hq=4, hkv=2, tq=70, tk=140)
    hidden = np.random.default_rng(5).random(140) < 0.4
    k2, v2 = k.copy(), v.copy()
    k2[:, :, hidden] = bad
    v2[:, :, hidden] = bad
    added = np.where(hidden, -np.inf, 0.5).astype(np.float32)
    for options in (
        {"mask": ~hidden},
        {"mask": added},
        {"mask": added, "softcap": 2.0, "dropout_p": 0.2, "seed": 1},
        {"mask": ~hidden, "precision": "int8"},
        {"mask": ~hidden, "return_scores": "softmax"},
    ):
        found, wanted = (bx.attention(q, *kv, **options) for kv in ((k2, v2), (k, v)))
        pairs = zip(found, wanted, strict=True) if "return_scores" in options else [(found, wanted)]
        assert all(same_bits([a], [b]) and np.isfinite(a).all() for a, b in pairs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nothing_leaks_from_the_future_or_behind_the_length(isa, bad):
    q, k, v = operands(hq=2, hkv=1, tq=100, tk=100)
    clean = bx.attention(q, k, v, causal=True)
    k2, v2 = k.copy(), v.copy()
    k2[:, :, 50:], v2[:, :, 50:] = bad, bad
    found = bx.attention(q, k2, v2, causal=True)
    assert same_bits([found[:, :, :50]], [clean[:, :, :50]])
    assert not np.isfinite(found[:, :, 50:]).any()
    cut = bx.attention(q, k2, v2, kv_lengths=[50, 50])
    assert same_bits([cut], [bx.attention(q, k[:, :, :50], v[:, :, :50])])


def test_rows_that_see_nothing_are_zeros(isa):
    q, k, v = operands()
    q[:, :, 3] = np.nan
    mask = np.ones((TQ, TK), bool)
    mask[3] = mask[7] = False
    for m in (mask, np.where(mask, 0, -np.inf).astype(np.float32)):
        out, p = bx.attention(q, k, v, mask=m, return_scores="softmax")
        assert not out[:, :, [3, 7]].any()
        assert not p[:, :, [3, 7]].any()
        assert np.isfinite(out).all()
    assert not bx.attention(q, k, v, kv_lengths=[0, 0]).any()
    assert not bx.attention(q, k, v, window=(0, 0), past_len=TK).any()


def test_nan_in_a_visible_key_shows(isa):
    q, k, v = operands(tk=200)
    k[0, 1, 150, 3] = np.nan
    v[1, 2, 60, 5] = np.inf
    out = bx.attention(q, k, v)
    assert np.isnan(out[0, 1]).all()
    assert np.isposinf(out[1, 2, :, 5]).all()
    out[0, 1], out[1, 2, :, 5] = 0, 0
    assert np.isfinite(out).all()


def test_huge_scores_do_not_overflow(isa):
    q, k, v = operands(tk=200)
    check_q = q * np.float32(1e15)
    found = bx.attention(check_q, k, v, mask=np.full(200, -1e30, np.float32))
    assert np.isfinite(found).all()
    out = bx.attention(check_q, k, v)
    _, s = attention(check_q, k, v, return_scores="raw")
    best = np.take_along_axis(v, s.argmax(-1)[..., None], 2)
    np.testing.assert_allclose(out, best, rtol=1e-6)


def test_a_score_of_minus_infinity_is_not_seen(isa):
    q, k, v = (np.ones((1, 1, 2, 1), np.float32) for _ in range(3))
    k[0, 0, 0], v[0, 0, 0] = -np.inf, np.nan
    assert (bx.attention(q, k, v) == 1).all()


# --- one answer everywhere ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_threads_do_not_change_bits(threads, n):
    q, k, v = operands(b=2, hq=6, hkv=2, tq=90, tk=1200, dk=64, dv=64)
    bx.set_num_threads(1)
    wanted = bx.attention(q, k, v, causal=True, past_len=1100, return_scores="softmax")
    one = bx.attention(q[:1, :1, :1], k[:1, :1], v[:1, :1])
    bx.set_num_threads(n)
    assert same_bits(
        wanted, bx.attention(q, k, v, causal=True, past_len=1100, return_scores="softmax")
    )
    assert same_bits([wanted[0]], [bx.attention(q, k, v, causal=True, past_len=1100)])
    assert same_bits([one], [bx.attention(q[:1, :1, :1], k[:1, :1], v[:1, :1])])


def test_few_queries_share_the_work_by_keys(until_threads):
    q, k, v = operands(1, 1, 1, 1, 20000, 64, 64)
    bx.set_isa("scalar")
    until_threads(2, lambda: bx.attention(q, k, v))
    bx.set_isa("auto")


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


# --- memory ------------------------------------------------------------------------------------


def test_counted_memory_does_not_grow_with_length():
    """After the first call at a shape, a call 16 times as long takes no more."""
    short, long = (operands(1, 2, 1, t, t, 16, 16) for t in (512, 8192))
    bx.attention(*short, causal=True)
    bx.attention(*long, causal=True, window=(64, 0))
    bx.reset_peak_memory()
    before = bx.memory_stats().peak
    bx.attention(*long, causal=True, window=(64, 0), mask=np.ones(8192, bool), softcap=3.0)
    assert bx.memory_stats().peak == before


def test_peak_memory_is_linear_and_blind_to_shared_heads():
    """VmHWM of fresh processes: 8 query heads on one KV head cost one KV head."""
    code = """
import numpy as np, bitnet_ext as bx
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
t = 16384
q = np.ones((1, HEADS, t, 16), np.float32)
kv = np.ones((1, 1, t, 16), np.float32)
bx.attention(q[:, :, :64], kv, kv)
start = peak()
out = bx.attention(q, kv, kv, causal=True, window=(100, 0))
print(peak() - start - out.nbytes)
"""
    extra = [int(fresh.output(code.replace("HEADS", str(n)))) for n in (1, 8)]
    assert all(n < 3 << 20 for n in extra), extra  # scores alone would be a gigabyte a head


def test_a_thousand_calls_keep_nothing():
    code = """
import numpy as np, bitnet_ext as bx
def held():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return bx.memory_stats().current, int(line.split()[1]) * 1024
x, mask = np.ones((2, 3, 40, 8), np.float32), np.ones((40, 40), bool)
def calls(n):
    for _ in range(n):
        bx.attention(x, x, x, causal=True, mask=mask, return_scores="softmax")
calls(3000)  # the heap finds its size
before = held()
calls(1000)
print(*(b - a for a, b in zip(before, held())))
"""
    counted, resident = map(int, fresh.output(code, BITNET_NUM_THREADS="1").split())
    assert counted == 0
    assert resident < 32 << 10  # a small object a call would be more


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": np.zeros((TQ, 24), np.float32)}, "q: found"),
        ({"q": np.zeros((B, 4, TQ, 24))}, "q: found float64"),
        ({"k": np.zeros((B, 3, TK, 24), np.float32)}, "multiple of Hkv"),
        ({"k": np.zeros((B, 4, TK, 23), np.float32)}, "q, k, v: found"),
        ({"v": np.zeros((B, 4, TK - 1, 24), np.float32)}, "q, k, v: found"),
        ({"v": np.zeros((3, 4, TK, 24), np.float32)}, "q, k, v: found"),
        ({"v": np.zeros((B, 4, TK, 1025), np.float32)}, "1025"),
        ({"mask": np.zeros((TQ, TK), np.int8)}, "mask: found int8"),
        ({"mask": np.zeros((TQ, TK + 1), bool)}, "mask: found bool"),
        ({"mask": np.zeros((3, 1, TQ, TK), bool)}, "mask: found"),
        ({"past_len": -1}, "past_len: found -1"),
        ({"past_len": 1, "kv_lengths": [5, 5]}, "past_len: found 1 together with kv_lengths"),
        ({"kv_lengths": [5, TK + 1]}, "kv_lengths: found"),
        ({"kv_lengths": [5, -1]}, "kv_lengths: found"),
        ({"kv_lengths": [5.0, 1.0]}, "kv_lengths: found"),
        ({"kv_lengths": [1, 2, 3]}, "kv_lengths: found"),
        ({"window": 3}, "window: found 3"),
        ({"window": (1, -2)}, "window: found"),
        ({"softcap": -1.0}, "softcap: found -1.0"),
        ({"scale": np.inf}, "scale: found inf"),
        ({"dropout_p": 0.1}, "seed: found None"),
        ({"dropout_p": 1.0, "seed": 1}, "dropout_p: found 1.0"),
        ({"dropout_p": 0.5, "seed": [1, 2, 3]}, "seed: found"),
        ({"dropout_p": 0.5, "seed": 1.5}, "seed: found 1.5"),
        ({"precision": "f16"}, "precision: found 'f16'"),
        ({"return_scores": "probs"}, "return_scores: found 'probs'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_what_does_not_fit(change, message):
    q, k, v = operands()
    arguments = {"q": q, "k": k, "v": v} | change
    with pytest.raises(InvalidShapeError, match=message):
        bx.attention(**arguments)
