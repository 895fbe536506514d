"""The paged cache: growth, truncation, reordering, leases and the memory limit."""

import threading

import numpy as np
import pytest
from attention_cases import FLOAT_ISAS, int32, random_case, run, same_bits, step

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CacheFullError, InvalidShapeError
from bitnet_ext.memory import KVCache

PAGE = 64 * 2 * (16 + 16) * 4  # tokens, kv heads, dk + dv, float32


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


@pytest.fixture
def limit():
    """Lift the memory limit after the test."""
    yield
    bx.set_memory_limit(None)


def test_pages_come_as_they_are_needed_and_are_counted():
    before = bx.memory_stats().current
    cache = _core.KVCache(3, 2, 2, 16, 16, 1000, "f32")
    assert (cache.nbytes, cache.nbytes_reserved) == (0, 0)
    cache.reserve(int32([1, 0]))
    assert (cache.nbytes, cache.nbytes_reserved) == (0, 3 * PAGE)
    cache.advance(int32([1, 0]))
    cache.reserve(int32([64, 65]))
    assert (cache.nbytes, cache.nbytes_reserved) == (3 * PAGE, 9 * PAGE)
    assert bx.memory_stats().current - before == 9 * PAGE
    cache.reserve(int32([10, 10]))  # never shrinks
    assert cache.nbytes_reserved == 9 * PAGE
    del cache
    assert bx.memory_stats().current == before


@pytest.mark.parametrize(("kv_dtype", "page"), [("f16", 2 * 64 * 24), ("int8", 64 * (24 + 8))])
def test_half_and_int8_pages_are_smaller(kv_dtype, page):
    cache = _core.KVCache(2, 1, 3, 16, 8, 100, kv_dtype)
    cache.reserve(int32([100]))
    assert cache.nbytes_reserved == 2 * 2 * 3 * page


def test_advance_stays_within_the_reserved_room():
    cache = _core.KVCache(1, 2, 1, 4, 4, 100, "f32")
    cache.reserve(int32([70, 3]))
    cache.advance(int32([70, 3]))
    for counts in ([31, 0], [0, 62], [-1, 0]):
        with pytest.raises(InvalidShapeError, match="counts: found"):
            cache.advance(int32(counts))
    assert cache.lengths.tolist() == [70, 3]
    cache.advance(int32([30, 61]))
    assert cache.lengths.tolist() == [100, 64]


def test_truncate_then_append_gives_the_bits_of_a_fresh_cache(rng, isa):
    case = random_case(rng, [150, 80], 4, 2, 16)
    whole = run(case)
    cache = case.new_cache()
    step(case, cache, [140, 80])
    reserved = cache.nbytes_reserved
    cache.truncate(int32([60, 0]))
    assert cache.lengths.tolist() == [60, 0]
    assert cache.nbytes_reserved == reserved
    again = run(case, chunk=50, cache=cache)
    assert same_bits(again, [whole[0][60:], whole[1]])


@pytest.mark.parametrize("lengths", [[6, 0], [-1, 0], [0]])
def test_truncate_does_not_lengthen(rng, lengths):
    cache = _core.KVCache(1, 2, 1, 4, 4, 100, "f32")
    cache.reserve(int32([5, 5]))
    cache.advance(int32([5, 5]))
    with pytest.raises(InvalidShapeError, match="lengths: found"):
        cache.truncate(int32(lengths))
    assert cache.lengths.tolist() == [5, 5]


@pytest.mark.parametrize("rows", [[1, 0], [1, 1, 1], [0], [], [2, 0, 2, 1]])
def test_select_reorders_drops_and_duplicates(rng, rows):
    case = random_case(rng, [90, 70, 130], 4, 2, 16)
    whole = run(case)
    cache = case.new_cache()
    held = [64, 5, 100]
    step(case, cache, held)
    cache.select(int32(rows))
    assert cache.lengths.tolist() == [held[r] for r in rows]
    if not rows:
        assert cache.nbytes_reserved == 0
        return
    case.sequences = [case.sequences[r] for r in rows]
    found = run(case, chunk=9, cache=cache)
    assert same_bits(found, [whole[r][held[r] :] for r in rows])


def test_duplicates_do_not_share_what_they_append(rng):
    case = random_case(rng, [70], 2, 1, 16)
    cache = case.new_cache()
    step(case, cache, [60])
    cache.select(int32([0, 0]))
    other = random_case(rng, [70], 2, 1, 16)
    other.sequences[0][:60] = case.sequences[0][:60]
    case.sequences.append(other.sequences[0])
    found = run(case, cache=cache)
    assert same_bits(found, [whole[60:] for whole in run(case)])


@pytest.mark.parametrize("rows", [[3], [-1], [0, 5]])
def test_select_refuses_rows_that_are_not_there(rows):
    cache = _core.KVCache(1, 3, 1, 4, 4, 100, "f32")
    with pytest.raises(InvalidShapeError, match="rows: found"):
        cache.select(int32(rows))


def test_a_copy_is_independent(rng):
    case = random_case(rng, [100], 2, 1, 16)
    whole = run(case)[0]
    cache = case.new_cache()
    step(case, cache, [70])
    twin = cache.copy()
    noise = random_case(rng, [100], 2, 1, 16)
    cache.truncate(int32([3]))
    run(noise, cache=cache)
    assert twin.lengths.tolist() == [70]
    assert same_bits(run(case, cache=twin), [whole[70:]])


def test_a_second_lease_is_refused_and_the_first_goes_on(rng):
    case = random_case(rng, [10], 2, 1, 16)
    cache = case.new_cache()
    with cache.lease():
        with pytest.raises(RuntimeError, match="cache: in use by another call"), cache.lease():
            pass
        step(case, cache, [10])  # the holder's own ops run
        refused = []

        def elsewhere():
            for call in (
                lambda: cache.truncate(int32([0])),
                lambda: cache.select(int32([0])),
                lambda: cache.reserve(int32([10])),
                lambda: cache.advance(int32([0])),
                cache.copy,
                lambda: step(case, cache, [0]),
                cache.lease().__enter__,
            ):
                with pytest.raises(RuntimeError, match="in use"):
                    call()
                refused.append(cache.lengths.tolist())

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert refused == [[10]] * 7
    with cache.lease():
        cache.truncate(int32([0]))


def test_an_error_inside_a_lease_gives_it_back():
    cache = _core.KVCache(1, 1, 1, 4, 4, 100, "f32")
    with pytest.raises(ZeroDivisionError), cache.lease():
        _ = 1 / 0
    with cache.lease():
        pass


def test_reserve_is_all_or_nothing_under_a_memory_limit(rng, limit):
    case = random_case(rng, [300, 300, 300], 4, 2, 16)
    whole = run(case)
    cache = case.new_cache()
    step(case, cache, [10, 20, 30])
    reserved, in_use = cache.nbytes_reserved, bx.memory_stats().current
    bx.set_memory_limit(in_use + 3 * PAGE)
    with pytest.raises(MemoryError, match="no memory for more pages"):
        cache.reserve(int32([100, 100, 300]))
    assert cache.nbytes_reserved == reserved
    assert bx.memory_stats().current == in_use
    with pytest.raises(MemoryError):
        cache.select(int32([0, 0, 0, 0, 0, 1]))
    with pytest.raises(MemoryError):
        (cache.copy(), cache.copy())
    assert cache.lengths.tolist() == [10, 20, 30]
    bx.set_memory_limit(None)
    found = run(case, cache=cache)
    assert same_bits(found, [w[n:] for w, n in zip(whole, (10, 20, 30), strict=True)])


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0},
        {"batch": -1},
        {"kv_heads": 0},
        {"dk": 0},
        {"dv": 4096},
        {"max_len": 0},
        {"max_len": 1 << 31},
        {"kv_dtype": "bf16"},
    ],
    ids=str,
)
def test_impossible_shapes_are_refused(change):
    fitting = {
        "layers": 1,
        "batch": 1,
        "kv_heads": 1,
        "dk": 4,
        "dv": 4,
        "max_len": 10,
        "kv_dtype": "f32",
    }
    _core.KVCache(**fitting)
    with pytest.raises(InvalidShapeError, match=r"found .*wanted"):
        _core.KVCache(**fitting | change)


def test_the_public_cache_tells_its_room_and_its_bytes():
    cache = KVCache(BitNetConfig.tiny(), 2, 100, "f16")
    assert cache.length.tolist() == [0, 0]
    assert (cache.max_seq_len, cache.kv_dtype, cache.nbytes) == (100, "f16", 0)
    cache.check_room(int32([100, 0]))
    with pytest.raises(CacheFullError, match="sequence 1 holds 0 of 100 tokens, wanted room for"):
        cache.check_room(int32([0, 101]))
    cache._core.reserve(int32([1, 1]))
    assert cache.nbytes == 2 * 3 * 64 * 2 * 2 * 16 * 2
    with pytest.raises(InvalidShapeError, match="wanted values from 0 to 1"):
        cache.select([0, 2])
    with pytest.raises(InvalidShapeError, match="wanted 0 or more"):
        cache.truncate(-1)
    cache.reset()
    cache.select([1])
    assert cache.batch_size == 1
    assert cache.copy().max_seq_len == 100
    with pytest.raises(TypeError, match="does not pickle"):
        cache.__reduce__()
