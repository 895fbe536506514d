"""bx.attention on a device with int8 scores and half-precision values: the CPU's integers for
scores, and weights rounded to the values' type."""

import numpy as np
import pytest
from attention_cases import same_bits
from attention_op_cases import operands
from reference_attention import attention, round_kv

import bitnet_ext as bx

# Weights and the result are rounded to the type: half a unit in the last place each.
ROUNDED = {"float16": 2.0**-11 * 2, "bfloat16": 2.0**-9 * 2}


def type_of(name):
    return np.float16 if name == "float16" else pytest.importorskip("ml_dtypes").bfloat16


def on_device(device, q, k, v, **options):
    arrays = [device.to_device(x) for x in (q, k, v)]
    return device.to_host(bx.attention(*arrays, precision="int8", **options))


def near(device, q, k, v, **options):
    """The op on the device, within the stated error of float64 with the scores of int8 codes."""
    found = on_device(device, q, k, v, **options)
    rows = [round_kv(x, "int8") for x in (q, k)]
    lead = np.broadcast_shapes(*(x.shape[:-3] for x in (q, k, v)))
    flat = [
        np.broadcast_to(x, lead + x.shape[-3:]).reshape(-1, *x.shape[-3:])
        for x in (*rows, np.asarray(v, np.float64))
    ]
    if "kv_lengths" in options:
        options["kv_lengths"] = np.broadcast_to(options["kv_lengths"], len(flat[0]))
    wanted = attention(*flat, **options).reshape(found.shape)
    assert found.dtype == q.dtype
    off = np.abs(found.astype(np.float32) - wanted)
    largest = np.abs(v.astype(np.float32)).max()
    assert off.max(initial=0) <= (ROUNDED[v.dtype.name] + 1e-5) * largest
    return found


@pytest.mark.parametrize("dtype", ROUNDED)
@pytest.mark.parametrize("sizes", [(6, 9), (64, 64), (33, 16), (72, 128), (128, 20)], ids=str)
def test_it_is_near_the_cpus(device, sizes, dtype):
    arrays = operands(1, 4, 2, 37, 75, *sizes, dtype=type_of(dtype))
    for options in ({}, {"causal": True, "past_len": 20}, {"window": (9, 4), "kv_lengths": [70]}):
        near(device, *arrays, **options)


def test_values_are_copied_as_they_are_where_they_can_be(device):
    if not hasattr(device, "launches"):
        pytest.skip("the card does not list launches")
    for dtype in ROUNDED:
        for width in (16, 20, 72, 75):
            near(device, *operands(1, 2, 1, 3, 5, width, width, dtype=type_of(dtype)))
    kernels = {name for name, *_ in device.launches if name.startswith("attention")}
    assert len(kernels) == 8


def test_types_may_differ(device):
    q, k, v = operands(1, 2, 1, 5, 70, 24, 24)
    near(device, q, k.astype(np.float16), v.astype(np.float16))
    found = near(device, q.astype(np.float16), k, v.astype(type_of("bfloat16")))
    assert found.dtype == np.float16


@pytest.mark.parametrize("width", [64, 128])
def test_scores_are_the_cpus_integers(device, width):
    """Scores so far apart that one unit decides: the largest takes all, equal ones share."""
    q, k, v = operands(2, 4, 2, 40, 300, width, 16, dtype=np.float16)
    q[..., 0], k[..., 0] = 6, 6  # one scale for all, so that equal integers are equal scores
    q[..., 1:], k[..., 1:] = np.clip(q[..., 1:], -5, 5), np.clip(k[..., 1:], -5, 5)
    k[:, :, 200:240] = k[:, :, 40:80]
    found = near(device, q, k, v, scale=1e4).astype(np.float32)
    exact = bx.attention(q, k, v, scale=1e4).astype(np.float32)
    assert np.abs(found - exact).max() > 1  # some rows' largest is another one


def test_the_error_is_that_of_int8(device):
    """With outliers in q and k int8 is far from float32, and this is near int8."""
    q, k, v = operands(1, 2, 2, 20, 70, 32, 32, dtype=np.float16)
    q[..., 3], k[..., 5] = 60, -50
    found = near(device, q, k, v).astype(np.float32)
    exact = bx.attention(q, k, v).astype(np.float32)
    assert np.abs(found - exact).max() > 20 * ROUNDED["float16"] * np.abs(v).max()


@pytest.mark.parametrize("window", [None, (70, 0), (300, 20)])
def test_parts_of_the_queries_have_the_bits_of_the_whole(device, window):
    q, k, v = operands(1, 4, 1, 530, 530, 8, 8, dtype=np.float16)
    options = {"causal": window is None, "window": window}
    whole = near(device, q, k, v, **options)
    for a, z in ((0, 3), (3, 100), (511, 512), (529, 530)):
        part = on_device(device, q[:, :, a:z], k, v, past_len=a, **options)
        assert same_bits([part], [whole[:, :, a:z]]), (a, z)
        if window is None:  # without the keys that it does not see, and split
            cut = k[:, :, :z], v[:, :, :z]
            part = on_device(device, q[:, :, a:z], *cut, past_len=a, **options)
            assert same_bits([part], [whole[:, :, a:z]]), (a, z)


def test_views_and_leading_axes(device):
    q, k, v = operands(6, 4, 2, 20, 70, 16, 16, dtype=np.float16)
    wanted = near(device, q, k, v, kv_lengths=[70])
    for axes in ((0, 2, 1, 3), (2, 1, 0, 3), (0, 1, 3, 2)):
        back = np.argsort(axes)
        views = [device.to_device(x.transpose(axes).copy()).transpose(back) for x in (q, k, v)]
        found = bx.attention(*views, precision="int8", kv_lengths=[70])
        assert same_bits([device.to_host(found)], [wanted])
    split = [x.reshape((2, 3, *x.shape[1:])) for x in (q, k, v)]
    near(device, split[0], split[1][:, :1], split[2][:1])
    near(device, q[0], k[0], v[0])


def test_what_is_not_finite_shows_only_where_it_is_seen(device):
    q, k, v = operands(1, 1, 1, 6, 70, 8, 8, dtype=np.float16)
    k[0, 0, 40:] = np.nan
    q[0, 0, 2] = np.inf
    found = on_device(device, q, k, v, kv_lengths=[40])
    assert np.isnan(found[0, 0, 2]).all()
    others = [0, 1, 3, 4, 5]
    assert np.isfinite(found[0, 0, others]).all()
    assert np.isnan(on_device(device, q, k, v)).all()
    assert not on_device(device, q, k, v, kv_lengths=[0]).any()
    q[0, 0, 0] = 0
    near(device, q[:, :, :1], k[:, :, :40], v[:, :, :40])


def test_other_options_and_float32_values_have_the_cpus_bits(device):
    q, k, v = operands(1, 2, 1, 7, 75, 20, 20, dtype=np.float16)
    mask = np.arange(75) % 3 > 0
    for options in ({"mask": mask}, {"softcap": 2.0}, {"scale": -1.0}):
        found = on_device(device, q, k, v, **options)
        assert same_bits([found], [bx.attention(q, k, v, precision="int8", **options)])
    for arrays in (
        (q, k, v.astype(np.float32)),
        operands(1, 2, 1, 3, 70, 130, 16, dtype=np.float16),
    ):
        found = on_device(device, *arrays)
        assert same_bits([found], [bx.attention(*arrays, precision="int8")])
