"""The screened projection of the CUDA kernels: its bounds are the stated ones and hold, its logits
are those of the full product, whatever rows, ties and norms; and no step asks the host."""

import numpy as np
import pytest
import reference_screen
from hot_path import HotPath
from test_gpu_vocab import stored
from test_screen import HIDDEN, TABLES

from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.screen import ScreenedTop, most_largest
from bitnet_ext.gpu.screen_table import ScreenTable
from bitnet_ext.gpu.tables import DeviceTable

STATE = np.dtype(
    [
        ("step", "f4"),
        ("centre", "f4"),
        ("rest", "f4"),
        ("slack", "f4", 2),
        ("floor", "f4"),
        ("less", "i4", 2),
        ("listed", "u4", 2),
        ("screened", "i4"),
        ("", "V20"),
    ]
)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def upload(device, values, dtype="f32"):
    data, scales = stored(values, dtype)
    return DeviceTable.upload(device, data, dtype, scales)


class Found:
    """What a screen of ``table`` gives for rows ``x``, beside the full product."""

    def __init__(self, device, x, table, k, *, bias=None, active=None, seen=None, dtype="f32"):
        held = upload(device, table, dtype)
        given = None if bias is None else device.to_device(bias)
        rows = device.to_device(np.ascontiguousarray(x))
        mask = None if active is None else device.to_device(active)
        marks = None if seen is None else device.to_device(seen)
        full = device.empty((len(x), len(table)), np.float32)
        project(device, rows, held, given, full)
        self.full = device.to_host(full)
        self.screen = ScreenTable.of(device, held)
        top = ScreenedTop(device, held, given, self.screen, len(x), k)
        out = device.to_device(np.full(full.shape, 7, np.float32))
        top._device = HotPath(device)
        for _ in range(2):  # nothing is left over from the first time
            top.project(rows, out, mask, marks)
        self.out = device.to_host(out)
        self.states = device.to_host(top._states).view(STATE)[:, 0]
        self.whole = device.to_host(top._whole).astype(bool)
        self.largest = device.to_host(top._largest)
        self.shown = (self.out != -np.inf).sum(1)


def check(device, x, table, k, **options):
    """What ScreenedTop.project promises."""
    f = Found(device, x, table, k, **options)
    assert f.screen.finite
    active, seen = options.get("active"), options.get("seen")
    for m in range(len(x)):
        if active is not None and not active[m]:
            assert (f.out[m] == 7).all()
            continue
        shown = f.out[m] != -np.inf
        assert np.array_equal(f.out[m].view(np.int32)[shown], f.full[m].view(np.int32)[shown])
        others = np.ones(len(table), bool) if seen is None else seen[m] == 0
        assert shown[~others].all() or not np.isfinite(f.full[m, ~others]).all()
        ranked = np.sort(f.full[m, others][~np.isnan(f.full[m, others])])[::-1]
        if len(ranked) == 0:
            continue
        least = ranked[min(k, len(ranked)) - 1]
        wanted = others & ~(f.full[m] < least)  # ties with the k-th, and NaN
        assert shown[wanted].all() or least == -np.inf
    return f


def number_of(key):
    """The float32 of a key that orders as numbers do (select.cuh)."""
    bits = np.uint32(key ^ (0x80000000 if key >> 31 else 0xFFFFFFFF))
    return float(bits.view(np.float32))


# --- the bound --------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("name", TABLES)
def test_bounds_hold_and_are_the_stated_ones(device, name, hidden):
    rng = np.random.default_rng(3)
    table = TABLES[name](rng)[:70].astype(np.float32)
    x = HIDDEN[hidden](rng, table.shape[1]).astype(np.float32)
    bias = rng.standard_normal(len(table)).astype(np.float32)
    f = Found(device, x[None], table, 1, bias=bias)
    state, terms = f.states[0], device.to_host(f.screen.terms).astype(np.float64)
    assert state["screened"]
    four, _, eight = reference_screen.bounds(table, x, bias)
    scale = np.abs(table).max(1).astype(np.float64) / 127
    off = np.sqrt(len(x)) * 2.0**-15 * np.linalg.norm(x) * scale  # of the stored norms
    maybe = np.arange(len(table))  # what the planes before leave
    for plane, (estimate, wanted) in enumerate((four, eight)):
        reach = terms[0] * (terms[1 + plane] * state["rest"] + state["slack"][plane])
        reach += 2.0**-22 * np.abs(bias) + state["floor"]
        assert (np.abs(f.full[0] - estimate) <= reach).all()
        assert (np.abs(reach - wanted) <= 0.05 * wanted + off).all()
        best = np.max((estimate - reach)[np.isin(np.arange(70), maybe)])
        rounding = 2.0**-20 * (np.abs(estimate) + reach).max()
        assert abs(number_of(f.largest[0, plane].max()) - best) <= rounding
        maybe = np.flatnonzero(estimate + reach >= best - rounding)


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (33, 17), (70, 130)])
def test_the_planes_are_the_codes(device, dtype, vocab, width):
    """Unpacked by the layout that screen.cuh states, element by element."""
    held = upload(device, normal(width, vocab, width), dtype)
    screen = ScreenTable.of(device, held)
    one = np.eye(width, dtype=np.float32)
    out = device.empty((width, vocab), np.float32)
    project(device, device.to_device(one), held, None, out)
    values = device.to_host(out).T
    copies, scale = reference_screen.copies(values)
    spans = -(-width // 64)
    high = device.to_host(screen.high).reshape(-1, spans, 32, 4)
    low = device.to_host(screen.low).reshape(vocab, 2 * spans, 4)
    for v, e in np.ndindex(vocab, 64 * spans):
        t, j, i, b = e % 64 // 16, e % 16 // 8, e % 8 // 4, e % 4
        word = int(high[v // 16, e // 64, 4 * (v % 8) + t, 2 * i + v // 8 % 2])
        u = word >> (8 * b + 4 * j) & 15
        word = int(low[v, e // 32, e % 32 // 8])
        code = 16 * u + (word >> (8 * b + 4 * (e % 8 // 4)) & 15)
        if e >= width or scale[v] == 0:
            assert code == 128
            continue
        assert abs((code - 128) * scale[v] - copies[2][v, e]) < 1e-6 * scale[v]
        assert abs((16 * u - 120.5) * scale[v] - copies[0][v, e]) < 1e-6 * scale[v]
    assert screen.nbytes == 4 * (high.size + low.size) + 12 * vocab


# --- the projection ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(
    ("rows", "vocab", "width"), [(1, 1, 1), (1, 5, 17), (2, 300, 127), (1, 1100, 64)]
)
def test_random_rows(device, dtype, rows, vocab, width):
    table, bias = normal(width, vocab, width), normal(2, vocab)
    for k in sorted({1, most_largest(vocab)}):
        check(device, normal(1, rows, width), table, k, dtype=dtype)
        check(device, normal(1, rows, width), table, k, dtype=dtype, bias=bias)


@pytest.mark.parametrize("rows", [3, 4, 5, 8, 9, 33, 64])
def test_batches(device, rows):
    """A row gives the same beside others, whichever kernel takes them."""
    x, table = normal(1, rows, 70), normal(2, 200, 70)
    together = check(device, x, table, 2)
    assert not together.whole.any()
    alone = Found(device, x[-1:], table, 2)
    assert np.array_equal(together.out[-1], alone.out[0])


def aligned(vocab=600, width=192, batch=2):
    """Rows of unequal norms, and hidden states that point at some of them, as a trained head's."""
    table = normal(5, vocab, width) * np.random.default_rng(6).uniform(0.5, 2, (vocab, 1))
    rows = np.arange(batch) * 101 + 17
    x = 0.8 * table[rows] / np.linalg.norm(table[rows], axis=1, keepdims=True) * np.sqrt(width)
    return rows, (x + 0.3 * normal(7, batch, width)).astype(np.float32), table.astype(np.float32)


def test_few_logits_are_computed(device):
    rows, x, table = aligned()
    f = check(device, x, table, 1)
    assert (f.out.argmax(1) == rows).all()
    assert not f.whole.any()
    assert (f.states["listed"][:, 0] < 60).all()
    assert (f.states["listed"][:, 1] == f.shown).all()
    assert (f.shown <= 3).all()
    f = check(device, normal(1, 1, 192), table, 1)  # where nothing stands out
    assert f.states["listed"][0, 1] < 60 < f.states["listed"][0, 0]


@pytest.mark.parametrize("k", [1, 3, 9])
def test_ties_and_near_ties(device, k):
    _, x, table = aligned()
    best = table[17].copy()
    table[[3, 300, 599]] = best  # equal logits: all are shown
    table[40] = np.nextafter(best, np.float32(9))
    table[200] = np.nextafter(best, np.float32(-9))
    table[41:60] = best + 1e-6 * normal(8, 19, len(best))
    bias = np.zeros(len(table), np.float32)
    bias[300] = 1e-30
    assert not check(device, x, table, k).whole.any()
    assert not check(device, x, table, k, bias=bias).whole.any()


def test_extreme_norms_zero_rows_and_signs(device):
    _, x, table = aligned()
    scales = np.ones(len(table), np.float32)
    scales[::7] = 0
    scales[::11] = 1e20
    scales[1::11] = 1e-30
    scales[2::11] = -1e20
    scales[3::11] = 1e-42
    check(device, x, table * scales[:, None], 3)
    check(device, x * 1e-10, table * scales[:, None], 3)
    check(device, x, -np.abs(table), 3)
    check(device, np.abs(x), -np.abs(table), 9)  # every logit is negative
    table[1::2] = 0  # half of the logits are 0
    check(device, -np.abs(x), np.abs(table), 3)


def test_an_equal_table_falls_back_to_the_full_product(device):
    x, table = normal(0, 2, 40), np.tile(normal(1, 1, 40), (333, 1))
    for same in (table, table * 0):
        f = check(device, x, same, 2)
        assert f.whole.all()
        assert (f.shown == 333).all()


def test_only_the_rows_that_want_it_fall_back(device):
    _, x, table = aligned(batch=5)
    x[0] = 0
    x[1, 7] = np.nan
    x[3, 2] = np.inf
    f = check(device, x, table, 2)
    assert f.whole.tolist() == [True, True, False, True, False]
    assert (f.shown[[2, 4]] < 60).all()
    f = check(device, x[2:3] * np.float32(3e34), table * np.float32(1e4), 2)
    assert f.whole.all()
    assert check(device, x[2:3] * np.float32(1e-30), table, 2).whole.all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38])
def test_biases_of_any_value(device, value):
    _, x, table = aligned()
    bias = normal(3, len(table))
    bias[[17, 20, 21]] = value
    check(device, x, table, 1, bias=bias)
    check(device, x, table, 6, bias=bias)
    bias[:] = value
    check(device, x, table, 6, bias=bias)


@pytest.mark.parametrize("k", [1, 3])
def test_marked_ids_are_there_and_count_for_none_of_the_k(device, k):
    _, x, table = aligned()
    full = Found(device, x, table, 1).full
    order = np.argsort(-full, axis=1)
    seen = np.zeros(full.shape, np.uint8)
    seen[0, order[0, :30]] = 1
    seen[1, order[1, -5:]] = 1
    assert not check(device, x, table, k, seen=seen).whole.any()
    seen[0] = 1
    assert check(device, x, table, k, seen=seen).whole.tolist() == [True, False]


def test_rows_that_are_not_active_are_left_alone(device):
    _, x, table = aligned(batch=6)
    x[4] = 0
    active = np.array([True, False, True, False, True, False])
    f = check(device, x, table, 2, active=active)
    assert f.whole.tolist() == [False, False, False, False, True, False]


def test_a_table_that_is_not_finite_has_no_screen(device):
    for value in (np.nan, np.inf, -np.inf):
        table = normal(0, 50, 33)
        table[49, 32] = value
        assert not ScreenTable.of(device, upload(device, table)).finite
