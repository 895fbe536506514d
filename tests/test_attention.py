"""Causal attention over the paged cache: right against float64, and one answer everywhere."""

import numpy as np
import pytest
from attention_cases import FLOAT_ISAS, int32, random_case, reference, run, same_bits, step

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import CacheFullError, InvalidShapeError

LENGTHS = [3, 0, 70, 1, 130]
SHAPES = [  # q heads, kv heads, dk, dv: groups of 1, 3, 4, 7
    (2, 2, 2, 2),
    (3, 1, 6, 6),
    (4, 1, 16, 16),
    (7, 1, 64, 64),
    (6, 2, 80, 80),
    (8, 2, 128, 128),
    (7, 1, 24, 40),
    (4, 4, 33, 7),
    (2, 1, 1024, 1000),
]


@pytest.fixture
def rng():
    """The same numbers in every run."""
    return np.random.default_rng(7)


@pytest.fixture(params=FLOAT_ISAS)
def isa(request):
    """Force each ISA that has float kernels of its own."""
    bx.set_isa(request.param)
    yield request.param
    bx.set_isa("auto")


def assert_close(found, wanted, tolerance):
    for a, b in zip(found, wanted, strict=True):
        if len(b):
            np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_follows_the_definition(rng, isa, shape):
    case = random_case(rng, LENGTHS, *shape, rope=shape[2] % 2 == 0)
    assert_close(run(case), reference(case), 4e-6)


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
@pytest.mark.parametrize("shape", [(4, 2, 16, 16), (3, 1, 6, 40)], ids=str)
def test_rounded_caches_attend_to_the_rounded_values(rng, isa, shape, kv_dtype):
    case = random_case(rng, LENGTHS, *shape, kv_dtype=kv_dtype)
    assert_close(run(case), reference(case), 4e-6)
    assert same_bits(run(case), run(case, chunk=1))


@pytest.mark.parametrize(("kv_dtype", "bound"), [("f16", 1.5e-3), ("int8", 4e-2)])
def test_the_error_of_rounding_the_cache_is_small(rng, kv_dtype, bound):
    exact = random_case(rng, [300], 4, 1, 64)
    rounded = random_case(rng, [300], 4, 1, 64, kv_dtype=kv_dtype)
    rounded.sequences = exact.sequences
    error = np.abs(run(rounded)[0] - reference(exact)[0]).max()
    assert 1e-5 < error < bound


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_every_isa_gives_the_same_bits(rng, kv_dtype):
    case = random_case(rng, [67, 530], 6, 2, 24, 40, kv_dtype=kv_dtype, window_left=520)
    found = {}
    for name in bx.available_isas():
        bx.set_isa(name)
        with bx.DispatchMetrics() as metrics:
            found[name] = run(case)
        table = _core.kernel_tables()["attention"]
        assert {isa for _, _, isa, _ in metrics.as_dict()} == {table}
    bx.set_isa("auto")
    first = found.popitem()[1]
    assert all(same_bits(first, other) for other in found.values())


@pytest.mark.parametrize("kv_dtype", ["f32", "int8"])
def test_chunked_prefill_and_decode_give_the_bits_of_the_whole(rng, threads, kv_dtype):
    case = random_case(rng, [1537, 40, 513], 4, 1, 16, kv_dtype=kv_dtype)
    whole = run(case)
    assert_close([whole[0][-3:]], [reference(case)[0][-3:]], 4e-6)
    for chunk, n in ((1, 2), (7, 3), (64, 1), (100, 2), (512, 3)):
        bx.set_num_threads(n)
        assert same_bits(whole, run(case, chunk)), (chunk, n)


def test_a_sequence_has_the_same_bits_alone_and_in_any_batch(rng):
    case = random_case(rng, [520, 65, 1, 200], 6, 2, 16)
    together = run(case)
    for i, rows in enumerate(case.sequences):
        alone = random_case(rng, [len(rows)], 6, 2, 16)
        alone.sequences = [rows]
        assert same_bits(run(alone, chunk=33), [together[i]])


def most_threads(op, call):
    """The most threads that ``op`` ran on; a busy machine may wake a worker too late many times."""
    for _ in range(500):
        with bx.DispatchMetrics() as metrics:
            call()
        most = max(count.threads for (name, *_), count in metrics.as_dict().items() if name == op)
        if most > 1:
            break
    return most


@pytest.mark.parametrize("n", [1, 2, 3])
def test_threads_share_the_work_without_changing_it(rng, threads, n):
    case = random_case(rng, [600, 90], 8, 2, 64)
    bx.set_num_threads(1)
    wanted = run(case, chunk=599)
    bx.set_num_threads(n)
    assert same_bits(run(case, chunk=599), wanted)


def test_every_op_runs_on_more_than_one_thread(rng, threads):
    case = random_case(rng, [1100], 4, 1, 64)
    bx.set_num_threads(1)
    cache = case.new_cache()
    step(case, cache, [1000])
    twin = cache.copy()
    with bx.DispatchMetrics() as metrics:
        prefilled = step(case, cache, [99])
        decoded = step(case, cache, [1])
    counts = {op: count.threads for (op, *_), count in metrics.as_dict().items()}
    assert counts == {"rope_append": 1, "attention_prefill": 1, "attention_decode": 1}
    bx.set_num_threads(2)

    def prefill():
        twin.truncate(int32([1000]))
        assert same_bits(step(case, twin, [99]), prefilled)

    def decode():  # one kv head: split by chunks of keys
        twin.truncate(int32([1099]))
        assert same_bits(step(case, twin, [1]), decoded)

    long = random_case(rng, [1500], 8, 2, 64)
    assert most_threads("rope_append", lambda: step(long, long.new_cache(), [1500])) == 2
    assert most_threads("attention_prefill", prefill) == 2
    bx.set_isa("scalar")  # the same bits, slowly enough for a second thread to wake
    most = most_threads("attention_decode", decode)
    bx.set_isa("auto")
    assert most == 2


def test_a_window_hides_older_keys(rng, isa):
    for window in (0, 1, 63, 64, 100, 600):
        case = random_case(rng, [700, 5], 2, 1, 6, window_left=window)
        found = run(case, chunk=350)
        assert_close(found, reference(case), 4e-6)
        # A window as long as the past is no window.
        if window == 600:
            free = random_case(rng, [700, 5], 2, 1, 6)
            free.sequences = case.sequences
            assert found[0][:600].tobytes() == run(free)[0][:600].tobytes()


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_stale_nan_behind_the_length_never_leaks(rng, isa, kv_dtype):
    case = random_case(rng, [90, 90], 4, 2, 24, kv_dtype=kv_dtype)
    clean = run(case)
    cache = case.new_cache()
    good = case.sequences
    step(case, cache, [10, 70])
    case.sequences = [np.full_like(rows, np.nan) for rows in good]
    assert np.isnan(step(case, cache, [80, 20])[0]).all()
    cache.truncate(int32([10, 70]))
    case.sequences = good
    again = run(case, chunk=25, cache=cache)
    assert again[0].tobytes() == clean[0][10:].tobytes()
    assert again[1].tobytes() == clean[1][70:].tobytes()


@pytest.mark.parametrize("kv_dtype", ["f32", "f16", "int8"])
def test_nan_in_a_visible_key_shows(rng, kv_dtype):
    case = random_case(rng, [20], 2, 1, 16, kv_dtype=kv_dtype, rope=False)
    case.sequences[0][7, 2 * 16 + 3] = np.nan
    out = run(case)[0]
    assert np.isfinite(out[:7]).all()
    assert np.isnan(out[7:]).all()


def test_huge_scores_do_not_overflow(rng, isa):
    case = random_case(rng, [130], 2, 1, 16, spread=1e9)
    case.sequences[0][:, -16:] /= 1e9  # values of unit size
    found = run(case)
    assert np.isfinite(found[0]).all()
    assert_close(found, reference(case), 1e-5)


def test_layers_and_heads_have_pages_of_their_own(rng):
    case = random_case(rng, [70, 3], 4, 2, 16)
    other = random_case(rng, [70, 3], 4, 2, 16)
    cache = case.new_cache(layers=2)
    first = step(case, cache, [70, 3], layer=0, commit=False)
    second = step(other, cache, [70, 3], layer=1, commit=False)
    assert same_bits(first, run(case))
    assert same_bits(second, run(other))
    assert same_bits(step(case, cache, [70, 3], layer=0), first)


def test_rope_turns_q_and_k_in_place_as_the_definition_says(rng, isa):
    case = random_case(rng, [40], 3, 1, 10)
    qkv = case.sequences[0].copy()
    cos, sin = case.tables(40)
    cache = case.new_cache()
    cache.reserve(int32([40]))
    _core.rope_append(qkv, cos, sin, cache, 0, int32([0] * 40), int32(range(40)))
    heads = case.sequences[0][:, :40].reshape(40, 4, 10)
    a, b = heads[..., :5], heads[..., 5:]
    c, s = cos[:, None], sin[:, None]
    turned = np.concatenate([a * c - b * s, b * c + a * s], -1).reshape(40, 40)
    assert qkv[:, :40].tobytes() == turned.tobytes()
    assert qkv[:, 40:].tobytes() == case.sequences[0][:, 40:].tobytes()


def test_no_rows_is_no_work():
    cache = _core.KVCache(1, 2, 1, 4, 4, 8, "f32")
    qkv, out = np.empty((0, 12), np.float32), np.empty((0, 4), np.float32)
    empty = int32([])
    _core.rope_append(qkv, None, None, cache, 0, empty, empty)
    _core.attend(qkv, cache, 0, int32([0, 0, 0]), int32([0, 0]), 1.0, out)


def append_arguments(**changes):
    cache = _core.KVCache(2, 2, 1, 4, 4, 100, "f32")
    cache.reserve(int32([10, 70]))
    table = np.ones((80, 2), np.float32)
    arguments = {
        "qkv": np.zeros((3, 16), np.float32),
        "cos": table,
        "sin": table,
        "cache": cache,
        "layer": 1,
        "seq": int32([0, 1, 1]),
        "pos": int32([0, 69, 99]),
    }
    return arguments | changes


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 2},
        {"layer": -1},
        {"seq": int32([0, 1, 2])},
        {"seq": int32([0, -1, 1])},
        {"seq": int32([0, 1])},
        {"pos": int32([0, 64, 100])},
        {"pos": int32([64, 1, 2])},  # beyond the reserved page of sequence 0
        {"pos": int32([-1, 1, 2])},
        {"pos": np.array([0, 1, 2])},
        {"qkv": np.zeros((3, 15), np.float32)},
        {"qkv": np.zeros((3, 8), np.float32)},
        {"qkv": np.zeros((3, 16))},
        {"qkv": np.zeros((16, 3), np.float32).T},
        {"cos": None},
        {"cos": np.ones((79, 2), np.float32)},
        {"sin": np.ones((80, 3), np.float32)},
        {"cos": np.ones((50, 2), np.float32), "sin": np.ones((50, 2), np.float32)},
    ],
    ids=lambda change: "-".join(change),
)
def test_rope_append_refuses_what_does_not_fit(change):
    fitting = append_arguments(pos=int32([0, 64, 79]))
    _core.rope_append(**fitting)
    with pytest.raises(InvalidShapeError, match=r"wanted|contiguous"):
        _core.rope_append(**append_arguments(pos=int32([0, 64, 79])) | change)


def test_rope_append_keeps_committed_tokens():
    arguments = append_arguments(pos=int32([0, 64, 79]))
    arguments["cache"].advance(int32([1, 0]))
    with pytest.raises(InvalidShapeError, match="pos: found 0, wanted 1"):
        _core.rope_append(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 2},
        {"starts": int32([0, 3])},
        {"starts": int32([1, 1, 3])},
        {"starts": int32([0, 1, 2])},
        {"starts": int32([0, 4, 3])},
        {"first_pos": int32([0, 99])},
        {"first_pos": int32([64, 0])},
        {"first_pos": int32([-1, 0])},
        {"first_pos": int32([0])},
        {"out": np.zeros((3, 9), np.float32)},
        {"out": np.zeros((2, 8), np.float32)},
        {"qkv": np.zeros((3, 14), np.float32)},
        {"window_left": -2},
    ],
    ids=lambda change: "-".join(change),
)
def test_attend_refuses_what_does_not_fit(change):
    cache = _core.KVCache(2, 2, 1, 4, 4, 100, "f32")
    cache.reserve(int32([10, 70]))
    fitting = {
        "qkv": np.zeros((3, 16), np.float32),
        "cache": cache,
        "layer": 0,
        "starts": int32([0, 1, 3]),
        "first_pos": int32([63, 97]),
        "scale": 0.5,
        "out": np.zeros((3, 8), np.float32),
    }
    _core.attend(**fitting)
    with pytest.raises(InvalidShapeError, match=r"wanted|decrease"):
        _core.attend(**fitting | change)


def test_reserving_more_than_the_cache_may_hold_is_said():
    cache = _core.KVCache(1, 1, 1, 4, 4, 100, "f32")
    with pytest.raises(CacheFullError, match="101 tokens, wanted at most 100"):
        cache.reserve(int32([101]))
