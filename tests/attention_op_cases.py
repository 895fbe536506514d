"""Operands and options for tests of bx.attention and its gradients."""

import itertools

import numpy as np

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


def pairs(options):
    """Every two options (and each alone) that can stand together."""
    return [
        pair
        for pair in itertools.combinations_with_replacement(options, 2)
        if pair[0] == pair[1] or not options[pair[0]].keys() & options[pair[1]].keys()
        if set(pair) != {"past", "lengths"}
    ]
