"""What bx.attention hides, refuses and shares among threads."""

import numpy as np
import pytest
from attention_cases import same_bits
from attention_op_cases import TK, TQ, B, operands
from reference_attention import attention

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError

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
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "int8"},
        {"dropout_p": 0.3, "seed": [5, -1]},
        {"precision": "int8", "dropout_p": 0.3, "seed": 7, "softcap": 2.0},
        {"window": (100, -1), "mask": np.arange(1200, dtype=np.float32) % 7},
    ],
    ids="+".join,
)
def test_threads_do_not_change_bits(threads, n, options):
    q, k, v = operands(b=2, hq=6, hkv=2, tq=90, tk=1200, dk=64, dv=64)
    options = {"causal": True, "past_len": 1100} | options
    first = slice(None, 1), slice(None, 1), slice(None, 1)

    def results():
        few = {name: options[name] for name in options.keys() - {"seed"}} | {"seed": 5}
        out, scores = bx.attention(q, k, v, **options, return_scores="softmax")
        plain = bx.attention(q, k, v, **options)
        return out, scores, plain, bx.attention(q[first], k[first[:2]], v[first[:2]], **few)

    bx.set_num_threads(1)
    wanted = results()
    assert same_bits(wanted[:1], wanted[2:3])
    bx.set_num_threads(n)
    assert same_bits(wanted, results())


def test_few_queries_share_the_work_by_keys(until_threads):
    q, k, v = operands(1, 1, 1, 1, 20000, 64, 64)
    bx.set_isa("scalar")
    until_threads(2, lambda: bx.attention(q, k, v))
    bx.set_isa("auto")


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
