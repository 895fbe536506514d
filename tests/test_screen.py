"""The screened projection: its bounds hold, its logits are those of the full product, on every ISA
and any number of threads, whatever rows, ties and norms."""

import numpy as np
import pytest
import reference
import reference_screen
from test_vocab import stored

import bitnet_ext as bx
from bitnet_ext import _core

NOTHING = np.empty(0, np.int32)


def full_product(x, held, dtype, bias=None):
    out = np.empty((len(x), len(held)), np.float32)
    _core.project(x, held, dtype, None, bias, out)
    return out


def top(x, held, dtype, k, bias=None, keep=None, screen=None):
    """project_top on every ISA and two numbers of threads: one answer; (it, calls of each op)."""
    screen = screen or _core.VocabScreen(held, dtype)
    first = None
    for isa in bx.available_isas():
        bx.set_isa(isa)
        for threads in (1, 3):
            bx.set_num_threads(threads)
            out = np.full((len(x), len(held) + 3), 7, np.float32)
            with bx.DispatchMetrics() as metrics:
                _core.project_top(
                    x, held, dtype, bias, screen, k, keep or [NOTHING] * len(x), out[:, :-3]
                )
            assert (out[:, -3:] == 7).all()
            counts = metrics.as_dict()
            table = bx.dispatch_info()["screen"]["current"]
            assert ("vocab_screen", "cpu", table, "op") in counts
            found = out[:, :-3].copy(), {op: c.calls for (op, *_), c in counts.items()}
            first = first or found
            assert np.array_equal(first[0].view(np.int32), found[0].view(np.int32)), isa
            assert first[1] == found[1]
    return first


@pytest.fixture(autouse=True)
def restored():
    before = bx.get_isa(), bx.get_num_threads()
    yield
    bx.set_isa(before[0])
    bx.set_num_threads(before[1])


def check(x, held, dtype, k, bias=None, keep=None):
    """What project_top promises; the calls of each op."""
    full = full_product(x, held, dtype, bias)
    out, calls = top(x, held, dtype, k, bias, keep)
    shown = out != -np.inf
    assert np.array_equal(out.view(np.int32)[shown], full.view(np.int32)[shown])
    for m in range(len(x)):
        kept = NOTHING if keep is None else keep[m]
        assert shown[m, kept].all() or not np.isfinite(full[m, kept]).all()
        others = np.delete(np.arange(len(held)), kept)
        if len(others) == 0:
            continue
        ranked = others[reference.topk(full[m, others], len(others))]
        least = full[m, ranked[min(k, len(ranked)) - 1]]
        wanted = full[m] >= least  # ties with the k-th too
        assert shown[m, others[wanted[others]]].all() or least == -np.inf
        if np.isfinite(full[m]).all():  # and nothing else
            assert (shown[m, others] == wanted[others]).all()
    if keep is None:
        for found, wanted in zip(_core.topk(out, k), _core.topk(full, k), strict=True):
            assert np.array_equal(found.view(np.int32), wanted.view(np.int32))
    return calls


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


# --- the bound --------------------------------------------------------------------------------

TABLES = {
    "normal": lambda rng: rng.standard_normal((200, 300)),
    "heavy tails": lambda rng: rng.standard_t(2, (200, 300)),
    "spread norms": lambda rng: (
        rng.standard_normal((200, 300)) * 10.0 ** rng.uniform(-30, 20, (200, 1))
    ),
    "one value a row": lambda rng: np.eye(200, 300) * 3,
    "ternary": lambda rng: rng.integers(-1, 2, (200, 300)),
    "half steps": lambda rng: (rng.integers(-127, 128, (200, 300)) + 0.5) / 64,
    "narrow": lambda rng: rng.standard_normal((200, 1)),
    "subnormal": lambda rng: rng.standard_normal((200, 300)) * 1e-40,
    "zeros": lambda rng: np.zeros((200, 300)),
}
HIDDEN = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "outliers": lambda rng, n: rng.standard_normal(n) * np.where(np.arange(n) % 97 == 5, 200, 1),
    "one": lambda rng, n: np.eye(1, n)[0] * 1000,
    "positive": lambda rng, n: rng.uniform(0.9, 1.1, n),
    "large": lambda rng, n: rng.standard_normal(n) * 1e6,
    "small": lambda rng, n: rng.standard_normal(n) * 1e-12,
}


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("table", TABLES)
def test_bounds_hold_and_are_the_stated_ones(table, hidden, isa):
    rng = np.random.default_rng(3)
    w = TABLES[table](rng).astype(np.float32)
    x = HIDDEN[hidden](rng, w.shape[1]).astype(np.float32)
    bias = rng.standard_normal(len(w)).astype(np.float32)
    found = _core.VocabScreen(w, "f32").bounds(x, bias)
    assert found is not None
    exact = full_product(x[None], w, "f32", bias)[0].astype(np.float64)
    for (lower, upper), (estimate, reach) in zip(
        found.astype(np.float64), reference_screen.bounds(w, x, bias), strict=True
    ):
        assert (lower <= exact).all()
        assert (exact <= upper).all()
        scale = np.abs(w).max(1).astype(np.float64) / 127
        off = np.sqrt(len(x)) * 2.0**-15 * np.linalg.norm(x) * scale  # of the stored norms
        rounding = 2.0**-22 * (np.abs(estimate) + reach + np.abs(bias))
        assert (np.abs((upper - lower) / 2 - reach) <= 1e-3 * reach + off + rounding).all()
        assert (np.abs((upper + lower) / 2 - estimate) <= 0.01 * reach + rounding).all()


def test_bounds_hold_at_the_width_of_2b():
    w, x = normal(0, 500, 2560), normal(1, 2560)
    x[[5, 1000]] = 60, -45
    held, values = stored(w, "bf16")
    found = _core.VocabScreen(held, "bf16").bounds(x, None)
    exact = full_product(x[None], held, "bf16")[0]
    spread = np.linalg.norm(values, axis=1) * np.linalg.norm(x)
    for (lower, upper), part in zip(found, (0.16, 0.042, 0.012), strict=True):
        assert (lower <= exact).all()
        assert (exact <= upper).all()
        assert ((upper - lower) / 2 < part * spread).all()


def test_no_bound_is_claimed_where_none_is_known():
    screen = _core.VocabScreen(normal(0, 9, 40), "f32")
    x = normal(1, 40)
    for bad in (x * 0, x * np.float32(1e-30), x * np.float32(1e33)):
        assert screen.bounds(bad, None) is None
    for value in (np.nan, np.inf, -np.inf):
        x[3] = value
        assert screen.bounds(x, None) is None


# --- the projection ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
@pytest.mark.parametrize(("vocab", "width"), [(1, 1), (5, 17), (16, 127), (700, 128), (1500, 301)])
def test_random_rows(dtype, vocab, width):
    held, _ = stored(normal(width, vocab, width), dtype)
    x, bias = normal(1, 11, width), normal(2, vocab)  # more rows than one pass takes
    for k in sorted({1, min(2, vocab), min(8, vocab), vocab // 3 + 1, vocab}):
        check(x, held, dtype, k)
        check(x[:1], held, dtype, k, bias)


def aligned(vocab=4000, width=512, batch=3):
    """Rows of unequal norms, and hidden states that point at some of them, as a trained head's."""
    table = normal(5, vocab, width) * np.random.default_rng(6).uniform(0.5, 2, (vocab, 1))
    rows = np.arange(batch) * 701 + 17
    x = 0.8 * table[rows] / np.linalg.norm(table[rows], axis=1, keepdims=True) * np.sqrt(width)
    return rows, (x + 0.3 * normal(7, batch, width)).astype(np.float32), table.astype(np.float32)


def test_a_clear_winner_is_found_from_four_bits():
    rows, x, table = aligned()
    held, _ = stored(table, "bf16")
    assert check(x, held, "bf16", 1) == {"vocab_screen": 1}
    out, _ = top(x, held, "bf16", 1)
    assert (out.argmax(1) == rows).all()
    assert ((out > -np.inf).sum(1) < 20).all()
    assert bytes_read(x[:1], held) < held.nbytes * 0.35


def test_six_bits_serve_where_no_logit_stands_out():
    held, _ = stored(normal(5, 4000, 2048), "bf16")
    x = normal(6, 1, 2048)
    assert check(x, held, "bf16", 1) == {"vocab_screen": 1}
    screen = _core.VocabScreen(held, "bf16")
    first, then = (bytes_read(x, held, screen) / held.nbytes for _ in range(2))
    assert 6 / 16 < then < first < 7 / 16  # the second time without a list of nearly all


def test_the_way_to_the_largest_leaves_no_trace(isa):
    """Four bits first or six at once, and four again now and then: the same result."""
    held, _ = stored(normal(5, 1500, 1301), "bf16")
    screen, random = _core.VocabScreen(held, "bf16"), normal(6, 1, 1301)
    clear = (normal(5, 1500, 1301)[70:71] + 0.1 * random).astype(np.float32)
    reads = {}
    for x in [random] * 40 + [clear] * 40 + [random] * 2:
        out = np.empty((1, 1500), np.float32)
        with bx.DispatchMetrics() as metrics:
            _core.project_top(x, held, "bf16", None, screen, 2, [NOTHING], out)
        ((_, count),) = metrics.as_dict().items()
        full = full_product(x, held, "bf16")
        assert np.array_equal(out != -np.inf, full >= np.sort(full)[:, -2:-1])
        reads.setdefault(x is random, set()).add(count.bytes)
    assert len(reads[True]) == len(reads[False]) == 2


def bytes_read(x, held, screen=None):
    """By the screened top-1."""
    screen, out = (
        screen or _core.VocabScreen(held, "bf16"),
        np.empty((len(x), len(held)), np.float32),
    )
    with bx.DispatchMetrics() as metrics:
        _core.project_top(x, held, "bf16", None, screen, 1, [NOTHING] * len(x), out)
    return next(c.bytes for (op, *_), c in metrics.as_dict().items() if op == "vocab_screen")


@pytest.mark.parametrize("k", [1, 2, 5, 40])
def test_ties_and_near_ties(k):
    _, x, table = aligned()
    best = table[17].copy()
    table[[3, 900, 3999]] = best  # equal logits: all are shown
    table[40] = np.nextafter(best, np.float32(9))
    table[2000] = np.nextafter(best, np.float32(-9))
    table[41:60] = best + 1e-6 * normal(8, 19, len(best))
    bias = np.zeros(len(table), np.float32)
    bias[900] = 1e-30
    check(x, table, "f32", k)
    check(x, table, "f32", k, bias)
    assert check(x, table, "f32", k) == {"vocab_screen": 1}


def test_extreme_norms_zero_rows_and_signs():
    _, x, table = aligned()
    scales = np.ones(len(table), np.float32)
    scales[::7] = 0
    scales[::11] = 1e20
    scales[1::11] = 1e-30
    scales[2::11] = -1e20
    scales[3::11] = 1e-42
    check(x, table * scales[:, None], "f32", 3)
    check(x * 1e-10, table * scales[:, None], "f32", 3)
    check(x, -np.abs(table), "f32", 3)  # every logit may be negative
    check(np.abs(x), -np.abs(table), "f32", 30)
    table[1::2] = 0  # half of the logits are 0
    check(-np.abs(x), np.abs(table), "f32", 3)


def test_an_equal_table_falls_back_to_the_full_product():
    x = normal(0, 2, 40)
    table = np.tile(normal(1, 1, 40), (333, 1))
    assert check(x, table, "f32", 1) == {"vocab_screen": 1, "vocab_screen_fallback": 1}
    assert check(x, table * 0, "f32", 4) == {"vocab_screen": 1, "vocab_screen_fallback": 1}
    # More than a quarter of the rows asked for.
    assert check(x, normal(2, 333, 40), "f32", 84)["vocab_screen_fallback"] == 1


def test_only_the_rows_that_want_it_fall_back():
    _, x, table = aligned(batch=5)
    assert check(x, table, "f32", 2) == {"vocab_screen": 1}
    x[0] = 0
    x[1, 7] = np.nan
    x[3, 2] = np.inf
    # Neighbours together: rows 0 and 1, row 3.
    assert check(x, table, "f32", 2) == {"vocab_screen": 1, "vocab_screen_fallback": 2}
    overflowing = x[2:3] * np.float32(3e34)
    assert check(overflowing, table * np.float32(1e4), "f32", 2)["vocab_screen_fallback"] == 1


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3.4e38, -3.4e38])
def test_biases_of_any_value(value):
    _, x, table = aligned()
    bias = normal(3, len(table))
    bias[[17, 20, 21]] = value
    check(x, table, "f32", 1, bias)
    check(x, table, "f32", 6, bias)
    bias[:] = value
    check(x, table, "f32", 6, bias)


@pytest.mark.parametrize("k", [1, 3, 50])
def test_ids_to_keep_count_for_none_of_the_k(k):
    _, x, table = aligned()
    full = full_product(x, table, "f32")
    order = np.argsort(-full, axis=1).astype(np.int32)
    first, last = order[:, :200].copy(), order[:, -5:].copy()
    for keep in (
        [first[0], NOTHING, last[2]],
        [np.concatenate([first[0], first[0], last[0]]), first[1, :1], NOTHING],
    ):
        assert check(x, table, "f32", k, keep=keep) == {"vocab_screen": 1}
    everything = np.arange(len(table), dtype=np.int32)
    check(x, table, "f32", k, keep=[everything, everything[1:], NOTHING])


def test_a_table_that_is_not_finite_has_no_screen(isa):
    for value in (np.nan, np.inf, -np.inf):
        table = normal(0, 50, 33)
        table[49, 32] = value
        screen = _core.VocabScreen(table, "f32")
        assert not screen.finite
        with pytest.raises(bx.errors.InvalidShapeError, match="screen: found values that are not"):
            _core.project_top(
                normal(1, 1, 33), table, "f32", None, screen, 1, [NOTHING], normal(2, 1, 50)
            )


def test_memory_is_counted():
    before = bx.memory_stats().current
    screen = _core.VocabScreen(normal(0, 1000, 200), "f32")
    assert _core.VocabScreen.bytes(1000, 200) == 1000 * (256 + 16)
    assert 0 <= screen.nbytes - _core.VocabScreen.bytes(1000, 200) < 2 * 4096
    assert bx.memory_stats().current == before + screen.nbytes
    del screen
    assert bx.memory_stats().current == before


@pytest.mark.parametrize("spoilt", [None, 1, 2])
def test_into_chosen_rows(spoilt, isa):
    """Of all rows, those that the full product serves included."""
    x, held = normal(0, 4, 300), normal(1, 900, 300)
    if spoilt is not None:
        x[spoilt : spoilt + 2] = 0  # no bound is known
    keep = [np.array([i, 500 + i], np.int32) for i in range(4)]
    places = np.array([0, 2, 3, 6], np.int32)
    out = np.full((8, 900), 7, np.float32)
    _core.project_top(x, held, "f32", None, _core.VocabScreen(held, "f32"), 3, keep, out, places)
    wanted, calls = top(x, held, "f32", 3, keep=keep)
    assert ("vocab_screen_fallback" in calls) == (spoilt is not None)
    assert np.array_equal(out[places], wanted)
    assert (np.delete(out, places, 0) == 7).all()


def test_errors():
    table, x, out = normal(0, 5, 8), normal(1, 2, 8), np.empty((2, 5), np.float32)
    screen = _core.VocabScreen(table, "f32")
    wrong = bx.errors.InvalidShapeError

    def call(x=x, table=table, dtype="f32", bias=None, k=1, keep=(NOTHING, NOTHING), out=out):
        _core.project_top(x, table, dtype, bias, screen, k, list(keep), out)

    with pytest.raises(wrong, match=r"table: found f32 float32 \(4, 8\), wanted the screen's own"):
        call(table=table[:4])
    with pytest.raises(wrong, match="wanted the screen's own"):
        call(table=table.astype(np.int8), dtype="int8")
    with pytest.raises(wrong, match=r"x: found float32 \(2, 7\), wanted rows of 8"):
        call(x=x[:, :7])
    with pytest.raises(wrong, match=r"out: found float32 \(1, 5\), wanted \[2, 5\]"):
        call(out=out[:1])
    with pytest.raises(wrong, match="k: found 0, wanted 1 to 5"):
        call(k=0)
    with pytest.raises(wrong, match="k: found 6"):
        call(k=6)
    with pytest.raises(wrong, match=r"bias: found float32 \(4,\), wanted contiguous float32 \[5\]"):
        call(bias=normal(0, 4))
    with pytest.raises(wrong, match="keep: found 1 arrays, wanted 2"):
        call(keep=[NOTHING])
    with pytest.raises(wrong, match="keep: found id 5, wanted 0 to 4"):
        call(keep=[NOTHING, np.array([1, 5], np.int32)])
    with pytest.raises(wrong, match="keep: found int64"):
        call(keep=[NOTHING, np.array([1], np.int64)])
    with pytest.raises(wrong, match="dtype: found 'int8'"):
        _core.VocabScreen(table.astype(np.int8), "int8")
    with pytest.raises(wrong, match=r"table: found float32 \(5, 0\), wanted rows of 1 to"):
        _core.VocabScreen(table[:, :0], "f32")
    with pytest.raises(wrong, match="x: found"):
        screen.bounds(x[0, :5], None)
