"""The cache of masks: what it shares, finds, holds and drops."""

import threading

import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import masks
from bitnet_ext.errors import InvalidShapeError


def test_cache_hits_share_a_read_only_mask():
    cache = bx.MaskCache()
    first = cache.get(4, 6)
    assert cache.get(4, 6) is first
    assert np.array_equal(first, bx.create_causal_mask(4, 6))
    assert not first.flags.writeable
    assert cache.get(4, 6, 1) is not first
    assert cache.get(4, 6, window=(2, 0)) is not first
    assert cache.get(4, 6, dtype="bool").dtype == bool
    assert (cache.hits, cache.misses) == (1, 4)
    assert cache.hit_rate == 0.2
    assert cache.nbytes == 3 * 24 * 4 + 24
    cache.clear()
    assert (len(cache), cache.nbytes, cache.hits) == (0, 0, 1)
    assert bx.MaskCache().hit_rate == 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "bool"])
def test_cached_masks_stay_read_only(dtype):
    cache = bx.MaskCache()
    mask = cache.get(4, 6, dtype=dtype)
    assert mask.dtype == dtype
    assert mask.flags.c_contiguous
    for view in (mask, mask[1:], mask.view(np.uint8)):
        with pytest.raises(ValueError, match="WRITEABLE"):
            view.flags.writeable = True
    assert not isinstance(mask.base, np.ndarray)  # nor can an array below it be unlocked
    with pytest.raises(ValueError, match="read-only"):
        mask[0, 0] = 1
    assert cache.get(4, 0, dtype=dtype).shape == (4, 0)


def test_cache_finds_equal_arguments_however_they_are_written():
    cache = bx.MaskCache()
    one = cache.get(4, 6, window=(2, 0))
    for window in ([2, 0], (np.int64(2), -1), np.array([2, 5])):
        assert cache.get(4, 6, window=window) is one
    one = cache.get(4, 6)
    for dtype in ("float32", "f4", np.float32, np.dtype("f4")):
        assert cache.get(4, 6, dtype=dtype) is one
    assert cache.get(np.int64(4), 6, 2, window=(-1, 0), prefix=np.int8(0), device="auto") is one
    assert cache.get(4, 6, window=(2**50, 0)) is cache.get(4, 6, window=(2**60, 0))
    assert len(cache) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4.0, 6), "q_len: found 4.0"),
        ((4, 6.0), "k_len: found 6.0"),
        ((True, 1), "q_len: found True"),
        ((1, True), "k_len: found True"),
        ((1, 1, False), "past_len: found False"),
        ((4, 6, 2.0), "past_len: found 2.0"),
        ((-1, 6), "q_len: found -1"),
    ],
)
def test_cache_refuses_what_masks_refuse(arguments, message):
    cache = bx.MaskCache()
    cache.warm([1, (4, 6)])
    with pytest.raises(InvalidShapeError, match=message):
        cache.get(*arguments)
    for option in ({"prefix": False}, {"prefix": 0.0}, {"window": (True, 0)}, {"dtype": ["f4"]}):
        with pytest.raises(InvalidShapeError, match=f"{next(iter(option))}: found"):
            cache.get(4, 6, **option)
    assert (cache.hits, cache.misses) == (0, 2)


def test_cache_is_bounded_in_bytes():
    cache = bx.MaskCache(max_bytes=1000)
    one = cache.get(10, 10)
    cache.get(1, 100)
    assert cache.get(10, 10) is one
    assert cache.nbytes == 800
    cache.get(1, 50)  # 200 bytes: the last that fit
    assert (len(cache), cache.nbytes) == (3, 1000)
    cache.get(1, 1)  # 100 keys are the least recently used
    assert (len(cache), cache.nbytes) == (3, 604)
    assert cache.get(10, 10) is one
    cache.get(10, 25)
    assert (len(cache), cache.nbytes) == (1, 1000)
    assert cache.get(251, 1).shape == (251, 1)  # too large to keep: nothing makes room
    assert (len(cache), cache.nbytes) == (1, 1000)
    assert bx.MaskCache(0).get(2, 2).shape == (2, 2)
    with pytest.raises(InvalidShapeError, match="max_bytes: found -1"):
        bx.MaskCache(max_bytes=-1)


def test_cache_drops_the_least_recently_used():
    cache = bx.MaskCache(max_entries=2)
    one = cache.get(1, 1)
    cache.get(2, 2)
    cache.get(1, 1)
    cache.get(3, 3)
    assert cache.get(1, 1) is one
    assert cache.misses == 3
    cache.get(2, 2)
    assert cache.misses == 4
    assert len(cache) == 2


def test_cache_keeps_no_long_masks():
    cache = bx.MaskCache(max_side=16)
    assert cache.get(17, 2).shape == (17, 2)
    assert cache.get(2, 17).shape == (2, 17)
    assert len(cache) == 0
    cache.warm([16, (3, 5)], dtype="bool")
    assert len(cache) == 2
    cache.get(3, 5, dtype="bool")
    assert cache.hits == 1


def test_threads_that_miss_at_once_share_a_mask(monkeypatch):
    cache, first = bx.MaskCache(), []
    make = masks.create_causal_mask

    def overtaken(*arguments, **options):
        monkeypatch.undo()
        first.append(cache.get(4, 6))
        return make(*arguments, **options)

    monkeypatch.setattr(masks, "create_causal_mask", overtaken)
    assert cache.get(4, 6) is first[0]
    assert (cache.misses, cache.nbytes) == (2, 96)


def test_cache_serves_threads():
    cache = bx.MaskCache(max_entries=5)
    wrong = []

    def work(seed):
        rng = np.random.default_rng(seed)
        for n in rng.integers(0, 12, 400).tolist():
            if not np.array_equal(cache.get(n, n) == 0, np.tri(n, dtype=bool)):
                wrong.append(n)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    assert len(cache) <= 5
    assert cache.nbytes == sum(mask.nbytes for mask in cache._masks.values())
    assert cache.hits + cache.misses == 1600
