"""Nothing is kept from call to call; a memory limit is kept by working in smaller pieces."""

import dataclasses
import json

import fresh
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext.config import BitNetConfig
from bitnet_ext.memory.workspace import empty_array, workspace_bytes
from bitnet_ext.model.load import RandomWeights, load_weights
from bitnet_ext.model.transformer import Transformer

CALLS = """
import json
import numpy as np
import bitnet_ext as bx
from bitnet_ext.api import BitNetModel

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

model = BitNetModel.random(bx.BitNetConfig.tiny())
ids = np.arange(5)
cache, steps = model.new_cache(), model.new_cache()
out = np.empty((1, model.config.vocab_size), np.float32)

def prefill():
    cache.reset()
    model.prefill(ids, cache)

def decode():
    if steps.length[0] == 100:
        steps.reset()
    model.decode(ids[:1], steps, out=out)

grown = {}
for name, call in {
    "forward_full": lambda: model.forward_full(ids),
    "score": lambda: model.token_logprobs([ids]),
    "prefill": prefill,
    "decode": decode,
    "generate": lambda: model.generate([1, 2, 3], max_new_tokens=2, ignore_eos=True),
}.items():
    for _ in range(700):  # first uses, and the heap finds its size
        call()
    before = bx.memory_stats().current, resident()
    for _ in range(1000):
        call()
    grown[name] = [bx.memory_stats().current - before[0], resident() - before[1]]
print(json.dumps(grown))
"""


@pytest.fixture
def limit():
    """Set a limit of so many bytes above what is in use; lifted after the test."""

    def above(extra):
        bx.set_memory_limit(bx.memory_stats().current + extra)

    yield above
    bx.set_memory_limit(None)


@pytest.fixture(scope="module")
def config():
    return dataclasses.replace(BitNetConfig.tiny(), intermediate_size=1024)


@pytest.fixture
def model(config):
    return Transformer(config, load_weights(RandomWeights(config, 3)))


def ids_of(count):
    return np.random.default_rng(2).integers(0, 331, count)


def test_a_thousand_calls_of_each_entry_point_keep_nothing():
    grown = json.loads(fresh.output(CALLS))
    assert {name: counted for name, (counted, _) in grown.items()} == dict.fromkeys(grown, 0)
    if fresh.SANITIZED:
        return
    # A small object a call would be 32 KiB or more.
    assert all(resident < 32 << 10 for _, resident in grown.values()), grown


def test_peak_of_forward_full_is_what_was_estimated(model, config):
    tokens = 700
    model.forward_full(ids_of(tokens))  # tables and scratch of the threads
    model._engine.pool.clear()
    before = bx.memory_stats().current
    bx.reset_peak_memory()
    model.forward_full(ids_of(tokens))
    peak = bx.memory_stats().peak - before
    estimate = bx.estimate_memory(config, 1, tokens)
    wanted = estimate.total - estimate.weights
    assert 0.9 * wanted < peak < 1.1 * wanted


@pytest.mark.parametrize("rows", [1, 7, 100])
def test_forward_full_and_prefill_cut_themselves_to_the_limit(model, config, limit, rows):
    ids = ids_of(300)
    wanted = model.forward_full(ids)
    model._engine.pool.clear()
    out = empty_array(wanted.shape)
    hidden_and_kv = 300 * 4 * config.hidden_size + 320 * 2 * config.kv_size * 4
    slack = 24 * 4096
    limit(hidden_and_kv + workspace_bytes(config, rows) + slack)
    bx.reset_peak_memory()
    model.forward_full(ids, out=out)
    stats = bx.memory_stats()
    assert out.tobytes() == wanted.tobytes()
    assert stats.peak <= stats.limit
    assert all(w.rows <= rows + 20 for w in model._engine.pool._free)
    model._engine.pool.clear()
    bx.set_memory_limit(None)
    cache = model.new_cache(max_seq_len=300)
    cache._core.reserve(np.array([300], np.int32))
    limit(workspace_bytes(config, rows) + slack)
    assert model.prefill(ids, cache).tobytes() == wanted[-1].tobytes()


def test_prefill_leaves_room_for_its_own_pages(model, config, limit):
    """The pages of the new tokens are reserved first; blocks take what is left."""
    ids = ids_of(300)
    wanted = model.forward_full(ids)[-1]
    model._engine.pool.clear()
    pages = 320 * config.num_layers * 2 * config.kv_size * 4
    limit(pages + workspace_bytes(config, 9) + 24 * 4096)
    cache = model.new_cache(max_seq_len=300)
    assert model.prefill(ids, cache).tobytes() == wanted.tobytes()


def test_when_nothing_fits_the_error_says_how_much_is_missing(model, limit):
    ids = ids_of(300)
    model._engine.pool.clear()
    cache = model.new_cache(max_seq_len=300)
    before = bx.memory_stats().current
    limit(10_000)
    with pytest.raises(MemoryError, match=r"memory limit of \d+ bytes: .* needs at least \d+ more"):
        model.forward_full(ids)
    with pytest.raises(MemoryError, match="no memory for more pages"):
        model.prefill(ids, cache)
    assert cache.length.tolist() == [0]
    assert cache.tokens == [[]]
    assert bx.memory_stats().current == before
    bx.set_memory_limit(None)
    wanted = model.forward_full(ids)[-1]
    assert model.prefill(ids, cache).tobytes() == wanted.tobytes()


def test_decode_and_score_keep_the_limit_too(model, config, limit):
    ids = ids_of(200)
    wanted = model.forward_full(ids)
    scores = model.token_logprobs([ids])[0][0]
    model._engine.pool.clear()
    cache = model.new_cache(max_seq_len=200)
    model.prefill(ids[:-1], cache)
    model._engine.pool.clear()
    limit(workspace_bytes(config, 1) + 64 * 4096)
    out = model.decode(ids[-1:], cache)
    assert out[0].tobytes() == wanted[-1].tobytes()
    del out
    model._engine.pool.clear()
    bx.set_memory_limit(None)
    limit(200 * 8 * config.hidden_size + 256 * 2 * config.kv_size * 4 + 32 * 4 * 331 + 64 * 4096)
    assert model.token_logprobs([ids])[0][0].tobytes() == scores.tobytes()
