"""Where an op on arrays of the host runs: the estimate, and the choice made by it."""

import dataclasses
import math

import numpy as np
import pytest

import bitnet_ext as bx
import bitnet_ext.gpu.device
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.dispatch import Rates, Table, pays
from bitnet_ext.ops import attention_backward

COSTS = Table(None, 1.0, 10.0, 2.0, 100, {"op": Rates(host=4.0, device=100.0)})
FREE = Rates(host=1e-9, device=math.inf)  # a device that always wins
NOW = dataclasses.replace(
    dispatch.table(),
    call_seconds=0,
    link_bytes_per_second=math.inf,
    ops={"ternary": FREE, "attention": FREE},
)


@pytest.fixture
def always(monkeypatch):
    """The device wins, however small the work."""
    monkeypatch.setattr(dispatch, "table", lambda: NOW)
    monkeypatch.setattr(dispatch, "LEAST_WORK", 0)


@pytest.fixture
def nothing(monkeypatch):
    """No device."""

    def none():
        raise DeviceUnavailableError("device: found none")

    monkeypatch.setattr(bitnet_ext.gpu.device, "cuda_device", none)


def operands(rng):
    q, k, v = rng.standard_normal((3, 2, 2, 9, 8), np.float32)
    codes = rng.integers(-1, 2, (20, 40), np.int8)
    weight = bx.PackedTernary.pack(codes, 0.5, bits="2")
    return (q, k, v), weight, rng.standard_normal((3, 40), np.float32)


def multi_head(rng):
    module = bx.MultiHeadAttention(8, 4, kv_heads=2)
    shapes = module._shapes().items()
    module.load_state_dict({name: rng.standard_normal(shape, np.float32) for name, shape in shapes})
    return module


def ops(rng, **where):
    """Name, and a call of each op that chooses."""
    heads, weight, x = operands(rng)
    codes = rng.integers(-128, 128, (3, 40), np.int8)
    module, (row, other) = multi_head(rng), rng.standard_normal((2, 2, 9, 8), np.float32)
    mask = rng.random((9, 9)) < 0.8
    return {
        "linear": lambda: bx.ternary_linear(x[None], weight, np.arange(20.0), **where),
        "matmul": lambda: bx.ternary_matmul(codes, weight, **where),
        "attention": lambda: bx.attention(*heads, causal=True, **where),
        "scores": lambda: bx.attention(
            *(a.astype(np.float16) for a in heads), return_scores="raw", **where
        ),
        "gradients": lambda: attention_backward(heads[0], *heads, mask=mask, **where),
        "multi head": lambda: module(row, causal=True, add_input=True, **where),
        "cross": lambda: module(row.astype(np.float16), other, mask=mask, **where),
    }


def places(metrics):
    return {place for _, place, _, _ in metrics.as_dict()}


def same(found, wanted):
    for a, b in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, wanted)), strict=True):
        assert type(a) is np.ndarray
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


# --- the estimate ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("work", "nbytes", "threads", "wanted"),
    [
        # host: work / 4 a thread; device: 2 * (1 + bytes / 10 + work / 100)
        (8, 0, 1, False),  # 2 beside 2.16
        (9, 0, 1, True),  # 2.25 beside 2.18
        (9, 10, 1, False),  # a copy of a second
        (18, 0, 2, False),
        (100, 100, 1, True),  # 25 beside 24
        (100, 110, 1, False),
    ],
)
def test_the_estimate_is_the_formula(work, nbytes, threads, wanted):
    assert pays(COSTS, "op", work, nbytes, threads) is wanted


def test_the_table_that_ships():
    costs = dispatch.table()
    assert costs.margin >= 1
    assert costs.mask_elements == 16384
    assert set(costs.ops) == {"ternary", "attention"}
    for op in costs.ops:  # work that is never looked at
        assert not pays(costs, op, dispatch.LEAST_WORK, 0, 1)
    if costs.measured is None:  # then it errs on the CPU's side
        assert costs.margin >= 2
        assert not pays(costs, "ternary", 64 * 2560 * 2560, 64 * 5 * 2560, 64)
        assert not pays(costs, "attention", 512**2 * 128 * 20, 4 * 4 * 512 * 2560, 64)
    assert pays(costs, "ternary", 1e13, 1e8, 2)


# --- the choice --------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ops(np.random.default_rng(0)))
def test_a_device_that_wins_is_taken_and_shown(device, always, op):
    rng = np.random.default_rng
    with bx.DispatchMetrics() as on_host:
        wanted = ops(rng(1), device="cpu")[op]()
    with bx.DispatchMetrics() as by_way:
        found = ops(rng(1))[op]()
    same(found, wanted)
    assert places(on_host) == {"cpu"}
    assert places(by_way) == {"cuda"}
    copied = by_way.as_dict()["copy", "cuda", f"sm_{device.capability}", "op"]
    results = found if isinstance(found, tuple) else (found,)
    assert copied.calls >= 1 + len(results)
    assert copied.bytes > sum(a.nbytes for a in results)


@pytest.mark.parametrize("op", ops(np.random.default_rng(0)))
def test_small_work_stays_on_the_host(device, op):
    call, asked = (
        ops(np.random.default_rng(1), device="cuda")[op],
        ops(np.random.default_rng(1))[op],
    )
    with bx.DispatchMetrics() as metrics:
        wanted = asked()
    assert places(metrics) == {"cpu"}
    with bx.DispatchMetrics() as metrics:
        same(call(), wanted)
    assert places(metrics) == {"cuda"}


@pytest.mark.parametrize("op", ops(np.random.default_rng(0)))
def test_without_a_device(nothing, always, op):
    rng = np.random.default_rng
    same(ops(rng(1))[op](), ops(rng(1), device="cpu")[op]())
    with pytest.raises(DeviceUnavailableError, match="found none"):
        ops(rng(1), device="cuda")[op]()
    with pytest.raises(DeviceUnavailableError, match="found 'tpu', wanted 'auto', 'cpu' or 'cuda'"):
        ops(rng(1), device="tpu")[op]()


@pytest.mark.parametrize("error", [MemoryError, InvalidShapeError])
def test_what_a_device_has_no_room_for_or_does_not_take(device, always, monkeypatch, error):
    def refuse(*_):
        raise error("no")

    monkeypatch.setattr(dispatch, "send", refuse)
    rng = np.random.default_rng
    for op, call in ops(rng(1)).items():
        same(call(), ops(rng(1), device="cpu")[op]())
        with pytest.raises(error, match="no"):
            ops(rng(1), device="cuda")[op]()


def test_a_weight_that_is_not_there_costs_its_copy(monkeypatch, device):
    _, weight, x = operands(np.random.default_rng(2))
    seen = []

    def noted(costs, op, work, nbytes, threads):
        seen.append((op, work, nbytes))
        return True

    monkeypatch.setattr(dispatch, "pays", noted)
    monkeypatch.setattr(dispatch, "LEAST_WORK", 0)
    bx.ternary_linear(x, weight)
    bx.ternary_linear(x, weight)
    plain = ("ternary", 3 * 20 * 40, 4 * 3 * (40 + 20))
    more = (*plain[:2], plain[2] + 20 * 40)
    assert seen == [plain, more, plain, plain]


def test_work_of_attention(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "pays", lambda t, op, *found: bool(seen.append(found[:2])))
    monkeypatch.setattr(dispatch, "LEAST_WORK", 0)
    (q, k, v), _, _ = operands(np.random.default_rng(3))
    arrays = 4 * q.nbytes
    bx.attention(q, k, v)
    bx.attention(q, k, v, causal=True)
    bx.attention(q, k, v, window=(2, 0))
    bx.attention(q, k, v, return_scores="raw")
    bx.attention(q, k, v, precision="int8")  # its bits are each place's own
    pairs = 2 * 2 * 9 * 9 * 16
    scores = 4 * 2 * 2 * 9 * 9
    assert seen == [
        (pairs, arrays),
        (pairs / 2, arrays),
        (pairs / 3, arrays),
        (pairs, arrays + scores),
    ]


def test_work_of_gradients(monkeypatch):
    seen = []
    monkeypatch.setattr(dispatch, "pays", lambda t, op, *found: bool(seen.append((op, *found[:2]))))
    monkeypatch.setattr(dispatch, "LEAST_WORK", 0)
    (q, k, v), _, _ = operands(np.random.default_rng(3))
    attention_backward(q, q, k, v, causal=True)
    assert seen == [("attention", 4 * 2 * 2 * 9 * 9 * 16 / 2, 7 * q.nbytes)]


def test_work_of_multi_head_attention(monkeypatch, device):
    seen = []
    monkeypatch.setattr(dispatch, "pays", lambda t, op, *found: bool(seen.append((op, *found[:2]))))
    monkeypatch.setattr(dispatch, "LEAST_WORK", 0)
    module = multi_head(np.random.default_rng(3))
    x, other = np.ones((3, 5, 8), np.float32), np.ones((3, 7, 8), np.float32)
    module(x, causal=True)
    module(x, other)
    queries, keys, attended = 15 * 2 * 64, 2 * 2 * 2 * 8, 15 * 4 * 4
    weights = 4 * (2 * 64 + 2 * 32)
    assert seen == [
        ("attention", queries + 15 * keys + attended * 5 // 2, 2 * x.nbytes + weights),
        ("attention", queries + 21 * keys + attended * 7, 2 * x.nbytes + other.nbytes + weights),
    ]
    module(x, device="cuda")  # brings the weights
    module(x)
    assert seen[-1][2] == 2 * x.nbytes


def test_calls_that_keep_something_stay(device, always):
    module, x = multi_head(np.random.default_rng(3)), np.ones((2, 5, 8), np.float32)
    out = np.empty_like(x)
    with bx.DispatchMetrics() as metrics:
        module(x, cache_kv=True)
        module(x, use_cached_kv=True)
        module(x, append_kv=True)
        module(x, out=out)
        module(x, training=True)
        module.backward(x)
    assert places(metrics) == {"cpu"}
    for options in ({"cache_kv": True}, {"training": True}, {"out": out}):
        with pytest.raises(InvalidShapeError, match="device: found 'cuda' for arrays of the host"):
            module(x, device="cuda", **options)


def test_masks_are_made_where_they_are_large(device):
    small, large = (bx.create_causal_mask(n, n, device="auto") for n in (128, 129))
    assert type(small) is np.ndarray
    assert device.owns(large)
    np.testing.assert_array_equal(device.to_host(large), bx.create_causal_mask(129, 129))
    out = np.empty((129, 129), np.float32)
    assert bx.create_causal_mask(129, 129, device="auto", out=out) is out
    there = device.empty((2, 3), np.float32)
    assert bx.create_causal_mask(2, 3, device="auto", out=there) is there
    batch = bx.create_batch_causal_mask([129], [129], device="auto")
    assert device.owns(batch)
    parts = list(bx.iter_causal_mask(300, 129, 128, device="auto"))
    assert [device.owns(part) for part in parts] == [True] * 3
    with pytest.raises(DeviceUnavailableError, match="found 'tpu', wanted 'auto', 'cpu' or 'cuda'"):
        bx.create_causal_mask(1, 1, device="tpu")


def test_large_masks_without_a_device(nothing):
    assert type(bx.create_causal_mask(129, 129, device="auto")) is np.ndarray
    with pytest.raises(DeviceUnavailableError):
        bx.create_causal_mask(1, 1, device="cuda")
