"""Operands and options for tests of bx.attention and its gradients."""

import itertools

import numpy as np
import pytest

B, TQ, TK = 2, 13, 75


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands(b=B, hq=4, hkv=4, tq=TQ, tk=TK, dk=24, dv=24, dtype=np.float32, seed=0):
    shapes = ((b, hq, tq, dk), (b, hkv, tk, dk), (b, hkv, tk, dv))
    return [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def field(x, before=1, after=0):
    """``x`` as the field of packed records, one for each row: no whole elements apart."""
    records = np.zeros(
        x.shape[:-1],
        [("tag", "u1", (before,)), ("x", x.dtype, x.shape[-1:]), ("end", "u1", (after,))],
    )
    records["x"] = x
    return records["x"]


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
    "gqa": {"hkv": 2},
    "mqa": {"hkv": 1},
    "narrow-keys": {"dk": 16},
    "wide-values": {"dv": 70},
    "half": {"dtype": "float16"},
    "bfloat16": {"dtype": "bfloat16"},
    "records": {"layout": field},
    "lead": {"lead": (1, B)},
}
_SHAPES = {"hkv", "dk", "dv", "dtype"}
ROUNDED = {"float32": 1e-6, "float16": 6e-4, "bfloat16": 4e-3}  # of a result in that dtype


def problem(options):
    """q, k and v as some of the options shape them, and the others, which a call takes."""
    shape = {name: options[name] for name in options.keys() & _SHAPES}
    if shape.get("dtype") == "bfloat16":
        shape["dtype"] = pytest.importorskip("ml_dtypes").bfloat16
    lead, layout = options.get("lead", (B,)), options.get("layout", np.asarray)
    arrays = [layout(x.reshape(lead + x.shape[1:])) for x in operands(**shape)]
    of_call = options.keys() - _SHAPES - {"layout", "lead"}
    return arrays, {name: options[name] for name in of_call}


def plain(*arrays):
    """Copies in float32 with one leading axis."""
    return [np.asarray(x, np.float32).reshape(-1, *x.shape[-3:]) for x in arrays]


def pairs(options):
    """Every two options (and each alone) that can stand together."""
    return [
        pair
        for pair in itertools.combinations_with_replacement(options, 2)
        if pair[0] == pair[1] or not options[pair[0]].keys() & options[pair[1]].keys()
        if set(pair) != {"past", "lengths"}
    ]
