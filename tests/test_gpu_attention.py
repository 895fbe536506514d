"""bx.attention of arrays on a device: every option, the CPU's bits."""

import itertools

import numpy as np
import pytest
from attention_cases import same_bits

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError

B, TQ, TK = 2, 7, 75


def normal(*shape, seed=0, dtype=np.float32):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def operands(b=B, hq=4, hkv=2, tq=TQ, tk=TK, dk=6, dv=9, dtype=np.float32, seed=0):
    shapes = ((b, hq, tq, dk), (b, hkv, tk, dk), (b, hkv, tk, dv))
    return [normal(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes)]


def check(device, q, k, v, **options):
    """The op on the device gives the bits of the op on the host; returns its output."""
    wanted = bx.attention(q, k, v, **options)
    found = bx.attention(*map(device.to_device, (q, k, v)), **options)
    kind = options.get("return_scores")
    found, wanted = (found, wanted) if kind else ((found,), (wanted,))
    assert all(device.owns(array) for array in found)
    host = [device.to_host(array) for array in found]
    assert host[0].dtype == q.dtype
    assert same_bits(host, wanted), options
    return host[0]


# --- every pair of options ---------------------------------------------------------------------

MASK = np.where(np.random.default_rng(3).random((TQ, TK)) < 0.7, normal(TQ, TK), -np.inf)
OPTIONS = {
    "causal": {"causal": True},
    "past": {"past_len": 30},
    "scale": {"scale": -0.7},
    "softcap": {"softcap": 1.5},
    "window": {"window": (9, 4)},
    "lengths": {"kv_lengths": [40, 75]},
    "bool": {"mask": np.random.default_rng(4).random((B, 1, TQ, TK)) < 0.6},
    "float": {"mask": MASK.astype(np.float32)},
    "half": {"mask": normal(4, 1, TK - 9, dtype=np.float16)},
    "dropout": {"dropout_p": 0.3, "seed": 1 << 63},
    "seeds": {"dropout_p": 0.5, "seed": np.arange(B)},
    "int8": {"precision": "int8"},
    "raw": {"return_scores": "raw"},
    "softcap scores": {"return_scores": "softcap"},
    "mask scores": {"return_scores": "mask"},
    "softmax scores": {"return_scores": "softmax"},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(OPTIONS, 2)
    if not OPTIONS[a].keys() & OPTIONS[b].keys() and {a, b} != {"past", "lengths"}
]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option(device, option):
    check(device, *operands(), **OPTIONS[option])


def test_every_pair_of_options(device):
    for a, b in PAIRS:
        check(device, *operands(tq=TQ), **OPTIONS[a], **OPTIONS[b])


# --- sizes and layouts -------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["f32", "int8"])
@pytest.mark.parametrize("dk", [1, 2, 17, 64, 130, 300])
def test_every_width(device, dk, precision):
    for tq in (3, 7):  # 8 vectors to a block, and 32
        check(device, *operands(1, 2, 1, tq, 66, dk, min(dk, 130)), precision=precision)


@pytest.mark.parametrize("tk", [1, 16, 63, 64, 65, 512, 513, 1100])
def test_every_length(device, tk):
    check(device, *operands(1, 3, 3, 5, tk, 5, 6))
    check(device, *operands(1, 3, 1, 5, tk, 5, 6), causal=True, past_len=max(tk - 5, 0))
    check(device, *operands(1, 3, 1, 40, tk, 5, 6), window=(100, 3), return_scores="softmax")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_parts_of_the_keys_merge_to_the_bits_of_the_whole(device, dtype):
    q, k, v = operands(1, 2, 1, 2, 1100, 5, 70, dtype=dtype)
    for options in ({}, {"causal": True, "past_len": 600}, {"window": (0, 0), "past_len": 1050}):
        check(device, q, k, v, **options)
    merges = [kernel for kernel, *_ in getattr(device, "launches", []) if "merge" in kernel]
    assert merges or not hasattr(device, "launches")


@pytest.mark.parametrize(
    "sizes",
    [{"b": 0}, {"hq": 0, "hkv": 0}, {"tq": 0}, {"tk": 0}, {"dv": 0}, {"tq": 0, "tk": 0}],
    ids=str,
)
def test_empty_sizes(device, sizes):
    for kind in (None, "mask", "softmax"):
        check(device, *operands(**sizes), causal=True, return_scores=kind)


def test_any_leading_axes(device):
    q, k, v = operands(b=6)
    for lead in ((6,), (2, 3), (1, 6), (3, 1, 2)):
        check(device, *(x.reshape(lead + x.shape[1:]) for x in (q, k, v)), kv_lengths=[70])
    check(device, q[0], k[0], v[0])
    check(device, q, k[:1], v[0])  # one sequence's keys for all
    split = [x.reshape((2, 3, *x.shape[1:])) for x in (q, k, v)]
    check(device, split[0], split[1][:, :1], split[2][:1], mask=MASK)
    check(device, *split, mask=normal(3, 1, 1, TK) > 0)


@pytest.mark.parametrize("precision", ["f32", "int8", "f16"])
def test_grids_grow_with_the_batch_along_x_alone(device, precision):
    """A grid may have 65,535 blocks along y and z, and 2^31 along x."""
    if not hasattr(device, "launches"):
        pytest.skip("the card does not list launches")
    grids = []
    for b in (1, 3):
        device.launches.clear()
        bx.attention(*map(device.to_device, operands(b, tq=70, tk=9)), precision=precision)
        grids.append([grid for _, grid, _, _ in device.launches])
    for one, three in zip(*grids, strict=True):
        assert (three[0], three[1:]) == (3 * one[0], one[1:])


def test_views_are_read_in_place(device):
    q, k, v = operands(hq=4, hkv=2, tq=20, tk=80, dk=16, dv=16)
    wanted = bx.attention(q, k, v)
    for axes in ((0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)):
        back = np.argsort(axes)
        views = [device.to_device(x.transpose(axes).copy()).transpose(back) for x in (q, k, v)]
        assert same_bits([device.to_host(bx.attention(*views))], [wanted])


def test_half_types(device):
    check(device, *operands(dtype=np.float16))
    ml_dtypes = pytest.importorskip("ml_dtypes")
    check(device, *operands(dtype=ml_dtypes.bfloat16), mask=normal(TK).astype(ml_dtypes.bfloat16))


def test_values_that_are_not_finite_stay_where_they_are_seen(device):
    q, k, v = operands()
    k[:, :, 5], v[:, :, 6], v[:, :, 40] = np.nan, np.inf, np.nan
    hidden = np.ones(TK, bool)
    hidden[[5, 6]] = False
    found = check(device, q, k, v, mask=hidden, kv_lengths=[40, 30])
    assert np.isfinite(found).all()
    with np.errstate(invalid="ignore"):
        on_device = bx.attention(*map(device.to_device, (q, k, v)))
    assert np.isnan(device.to_host(on_device)).all()
    assert not check(device, q, k, v, mask=np.array(False)).any()


# --- where arguments live ----------------------------------------------------------------------


def test_masks_lengths_and_seeds_of_the_device(device):
    q, k, v = operands()
    options = {"mask": MASK, "kv_lengths": np.array([30, 75]), "dropout_p": 0.5}
    wanted = bx.attention(q, k, v, seed=np.array([3, 9]), **options)
    options |= {"mask": device.to_device(MASK), "kv_lengths": device.to_device(np.int32([30, 75]))}
    on_device = [device.to_device(x) for x in (q, k, v)]
    found = bx.attention(*on_device, seed=device.to_device(np.array([3, 9])), **options)
    assert same_bits([device.to_host(found)], [wanted])
    far = bx.attention(*on_device, kv_lengths=device.to_device(np.array([900, -5])))
    assert same_bits([device.to_host(far)], [bx.attention(q, k, v, kv_lengths=[TK, 0])])


def test_what_does_not_fit(device):
    q, k, v = (device.to_device(x) for x in operands())
    host = np.zeros((B, 2, TK, 6), np.float32)
    for arrays, found in (((q, host, v), "k: found it on the host"), ((host, k, v), "k: found it")):
        with pytest.raises(InvalidShapeError, match=found):
            bx.attention(*arrays)
    bad = [
        ({"mask": np.zeros((3, TQ, TK), bool)}, "mask: found"),
        ({"mask": device.to_device(np.zeros((2, 2, 1, TQ, TK), bool))}, "mask: found"),
        ({"kv_lengths": device.to_device(np.zeros(3, np.int64))}, "kv_lengths: found"),
        ({"kv_lengths": device.to_device(np.zeros(2, np.float32))}, "kv_lengths: found"),
        ({"kv_lengths": [1, TK + 1]}, "kv_lengths: found"),
        ({"dropout_p": 0.5}, "seed: found None"),
        ({"return_scores": "all"}, "return_scores: found"),
        ({"precision": "int4"}, "precision: found"),
    ]
    for options, message in bad:
        with pytest.raises(InvalidShapeError, match=message):
            bx.attention(q, k, v, **options)
    wide = device.to_device(np.zeros((1, 1, 1, 1025), np.float32))
    with pytest.raises(InvalidShapeError, match="head sizes 1025"):
        bx.attention(wide, wide, wide)


# --- half precision ----------------------------------------------------------------------------

ERROR = {"f16": 2e-3, "bf16": 1.5e-2}


def halves(device, q, k, v, dtype=None, **options):
    """The op on the device, its q, k and v as ``dtype``; near the op in float32."""
    wanted = bx.attention(q, k, v, **{**options, "precision": "f32"})
    arrays = [device.to_device(x if dtype is None else x.astype(dtype)) for x in (q, k, v)]
    found = device.to_host(bx.attention(*arrays, **options))
    assert found.dtype == (dtype or q.dtype)
    found = found.astype(np.float32)
    assert np.abs(found - wanted).max(initial=0) < ERROR[options["precision"]] * np.abs(v).max()
    return found


@pytest.mark.parametrize("precision", ["f16", "bf16"])
@pytest.mark.parametrize("sizes", [(6, 9), (64, 64), (72, 128)], ids=str)
def test_half_precision_is_near(device, sizes, precision):
    arrays = operands(1, 4, 2, 37, 75, *sizes)
    for options in ({}, {"causal": True, "past_len": 20}, {"window": (9, 4), "kv_lengths": [70]}):
        exact = device.to_host(bx.attention(*map(device.to_device, arrays), **options))
        assert not same_bits([halves(device, *arrays, precision=precision, **options)], [exact])


def test_half_types_in_half_precision(device):
    ml_dtypes = pytest.importorskip("ml_dtypes")
    for dtype, precision in ((np.float16, "f16"), (ml_dtypes.bfloat16, "bf16")):
        for sizes in ((64, 64), (16, 128), (20, 6)):  # whole words, and not
            halves(device, *operands(1, 2, 1, 20, 70, *sizes), dtype, precision=precision)
        halves(device, *operands(dk=16), np.float16, precision=precision)
        halves(device, *operands(dk=16), ml_dtypes.bfloat16, precision="bf16")
    kernels = {name for name, *_ in getattr(device, "launches", [])}
    assert len({name for name in kernels if name.endswith("true>")}) in (0, 4)


@pytest.mark.parametrize("window", [None, (70, 0), (300, 20)])
def test_parts_of_the_queries_have_the_bits_of_the_whole_in_half_precision(device, window):
    q, k, v = operands(1, 4, 1, 530, 530, 8, 8)
    options = {"causal": window is None, "window": window, "precision": "f16"}
    whole = halves(device, q, k, v, **options)
    for a, z in ((0, 3), (3, 100), (511, 512), (529, 530)):
        part = halves(device, q[:, :, a:z], k, v, past_len=a, **options)
        assert same_bits([part], [whole[:, :, a:z]]), (a, z)
        if window is None:  # without the keys that it does not see, and split
            part = halves(device, q[:, :, a:z], k[:, :, :z], v[:, :, :z], past_len=a, **options)
            assert same_bits([part], [whole[:, :, a:z]]), (a, z)


def test_half_precision_with_other_options_is_exact(device):
    q, k, v = operands()
    arrays = [device.to_device(x) for x in (q, k, v)]
    for options in (
        {"softcap": 2.0},
        {"mask": MASK},
        {"scale": -1.0},
        {"dropout_p": 0.5, "seed": 1},
        {"return_scores": "raw"},
    ):
        found = bx.attention(*arrays, precision="f16", **options)
        found, wanted = (found, bx.attention(q, k, v, **options))
        pair = ([device.to_host(x) for x in found], wanted) if "return_scores" in options else None
        assert same_bits(*(pair or ([device.to_host(found)], [wanted])))
    with pytest.raises(InvalidShapeError, match="precision: found 'f16'"):
        bx.attention(q, k, v, precision="f16")
