"""The screened head inside a model: decode_topk and generation give what the full product gives."""

import dataclasses
import threading

import numpy as np
import pytest
from test_bitwise import GPT2, LLAMA

import bitnet_ext as bx
from bitnet_ext import BitNetModel, _core
from bitnet_ext.memory import estimate
from bitnet_ext.model.head import Head
from bitnet_ext.model.load import RandomWeights, Table, load_weights

CONFIGS = {
    "tied": dataclasses.replace(bx.BitNetConfig.tiny(), vocab_size=3001),
    "head bias": dataclasses.replace(GPT2, vocab_size=2000),
    "untied": dataclasses.replace(LLAMA, vocab_size=2500),
}


@pytest.fixture
def screens(monkeypatch):
    """Every table is large enough for a screen."""
    monkeypatch.setattr(estimate, "_SCREEN_ELEMENTS", 1)


@pytest.fixture
def no_limit():
    yield
    bx.set_memory_limit(None)


def whole(monkeypatch):
    """From here on every projection is the full product."""
    monkeypatch.setattr(
        Head,
        "project_top",
        lambda self, hidden, out, k, keep, places: self.project(hidden, out, places),
    )


def calls(metrics):
    return {op: count.calls for (op, *_), count in metrics.as_dict().items()}


def prompts(config, batch=3):
    rng = np.random.default_rng(4)
    return [rng.integers(0, config.vocab_size, 3 + 2 * i).tolist() for i in range(batch)]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("k", [1, 5, 300])
def test_decode_topk_is_the_head_of_decode(name, k, screens, isa):
    model = BitNetModel.random(CONFIGS[name], seed=2)
    cache = model.new_cache(3)
    model.prefill(prompts(model.config), cache)
    twin = cache.copy()
    with bx.DispatchMetrics() as metrics:
        ids, values = model.decode_topk([1, 2, 3], cache, k)
    assert calls(metrics)["vocab_screen"] == 1
    assert "vocab_project" not in calls(metrics)
    found = _core.topk(model.decode([1, 2, 3], twin), k)
    assert np.array_equal(ids, found[0])
    assert np.array_equal(values.view(np.int32), found[1].view(np.int32))


def test_decode_largest_leaves_inactive_rows(screens):
    model = BitNetModel.random(CONFIGS["tied"])
    cache = model.new_cache(3)
    model.prefill(prompts(model.config), cache)
    twin = cache.copy()
    active = np.array([True, False, True])
    keep = [np.array(ids, np.int32) for ids in ([5, 3000], [1], [])]
    out = np.full((3, 3001), 7, np.float32)
    found = model.decode_largest([1, 2, 3], cache, 2, keep=keep, active=active, out=out)
    assert found is out
    assert (out[1] == 7).all()
    full = model.decode([1, 2, 3], twin, active=active)
    for row in (0, 2):
        shown = out[row] > -np.inf
        assert np.array_equal(out[row, shown], full[row, shown])
        assert shown[keep[row]].all()
        assert shown[np.argsort(full[row])[-2:]].all()
    assert cache.length.tolist() == [4, 5, 8]
    alone = model.decode_largest([1, 2, 3], twin, 1, active=active)
    assert np.isnan(alone[1]).all()


def test_decode_largest_errors(screens):
    model = BitNetModel.random(CONFIGS["tied"])
    cache = model.new_cache(2)
    model.prefill(prompts(model.config, 2), cache)
    before = cache.length.tolist()
    wrong = bx.errors.InvalidShapeError
    with pytest.raises(wrong, match="k: found 0, wanted 1 to 3001"):
        model.decode_largest([1, 2], cache, 0)
    with pytest.raises(wrong, match="k: found 3002"):
        model.decode_topk([1, 2], cache, 3002)
    with pytest.raises(wrong, match="keep: found 1 arrays, wanted 2"):
        model.decode_largest([1, 2], cache, 1, keep=[np.empty(0, np.int32)])
    with pytest.raises(wrong, match="keep: found id 3001"):
        model.decode_largest([1, 2], cache, 1, keep=[np.array([3001], np.int32)] * 2)
    with pytest.raises(wrong, match="active: found"):
        model.decode_largest([1, 2], cache, 1, active=np.ones(3, bool))
    assert cache.length.tolist() == before


GENERATION = {
    "greedy": {},
    "top_k 1": {"temperature": 0.7, "top_k": 1},
    "penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.6},
    "no stop yet": {"min_new_tokens": 12, "stop_token_ids": None},
    "no stop yet, penalty": {
        "min_new_tokens": 12,
        "stop_token_ids": None,
        "repetition_penalty": 1.2,
    },
    "top_k": {"temperature": 0.9, "top_k": 7},
    "top_k, penalty": {"temperature": 0.9, "top_k": 7, "repetition_penalty": 1.3},
    "top_k, reward": {"temperature": 0.9, "top_k": 7, "repetition_penalty": 0.5},
    "top_k, top_p": {"temperature": 1.5, "top_k": 40, "top_p": 0.7},
    "top_k, min_p": {"temperature": 1.5, "top_k": 40, "min_p": 0.2},
    "top_k of most": {"temperature": 1.5, "top_k": 1500},
}


@pytest.mark.parametrize("options", GENERATION)
def test_generation_gives_the_tokens_of_the_full_product(options, screens, monkeypatch):
    model = BitNetModel.random(CONFIGS["tied"], seed=1)
    settings = {"max_new_tokens": 16, "seed": 3, "ignore_eos": True, **GENERATION[options]}
    if settings.get("stop_token_ids", ()) is None:  # what would come first otherwise
        plain = model.generate(prompts(model.config), max_new_tokens=12, ignore_eos=True)
        settings["stop_token_ids"] = tuple({i for out in plain for i in out.token_ids})
    with bx.DispatchMetrics() as metrics:
        found = model.generate(prompts(model.config), **settings)
    assert calls(metrics)["vocab_screen"] > 0
    whole(monkeypatch)
    with bx.DispatchMetrics() as metrics:
        wanted = model.generate(prompts(model.config), **settings)
    assert "vocab_screen" not in calls(metrics)
    assert [out.token_ids for out in found] == [out.token_ids for out in wanted]
    assert [out.finish_reason for out in found] == [out.finish_reason for out in wanted]


@pytest.mark.parametrize("duplicates", [2, 40, 3001])
def test_generation_among_equal_rows(duplicates, screens, monkeypatch):
    """Logits tie in groups: the lowest id wins, and top-k keeps all that equal the k-th."""
    source = RandomWeights(CONFIGS["tied"], 1)
    table = source.table("embed")
    table.data[:] = table.data[np.arange(3001) // duplicates * duplicates]
    source.table = lambda name: table
    model = BitNetModel(CONFIGS["tied"], load_weights(source))
    options = [{}, {"repetition_penalty": 1.1}, {"temperature": 1.0, "top_k": 5, "seed": 1}]

    def run():
        return [
            [o.token_ids for o in model.generate(prompts(model.config), max_new_tokens=9, **more)]
            for more in options
        ]

    with bx.DispatchMetrics() as metrics:
        found = run()
    assert ("vocab_screen_fallback" in calls(metrics)) == (duplicates == 3001)
    whole(monkeypatch)
    assert found == run()


@pytest.mark.parametrize(
    "options", [{"logprobs": 2}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 3001}]
)
def test_other_choices_read_every_logit(options, screens):
    model = BitNetModel.random(CONFIGS["tied"], seed=1)
    with bx.DispatchMetrics() as metrics:
        model.generate(prompts(model.config), max_new_tokens=3, seed=1, **options)
    assert "vocab_screen" not in calls(metrics)


def test_small_and_int8_heads_have_no_screen(monkeypatch):
    hidden, out = np.ones((1, 32), np.float32), np.empty((1, 50), np.float32)
    keep = [np.empty(0, np.int32)]
    table = Table(np.ones((50, 32), np.float32), "f32")
    for small, int8 in ((True, False), (False, True)):
        if int8:
            data, scales = _core.quantise_head(table.data, "f32")
            table = Table(data, "int8", scales)
        monkeypatch.setattr(estimate, "_SCREEN_ELEMENTS", 50 * 32 + small)
        with bx.DispatchMetrics() as metrics:
            Head(table, None).project_top(hidden, out, 1, keep)
        assert calls(metrics) == {"vocab_project": 1}
        assert np.allclose(out, 32)


def test_a_table_with_nan_is_tried_once(screens):
    table = np.ones((50, 32), np.float32)
    table[7, 7] = np.nan
    head = Head(Table(table, "f32"), None)
    out = np.empty((1, 50), np.float32)
    with bx.DispatchMetrics() as metrics:
        for _ in range(3):
            head.project_top(np.ones((1, 32), np.float32), out, 1, [np.empty(0, np.int32)])
    assert calls(metrics) == {"screen_pack": 1, "vocab_project": 3}
    assert np.isnan(out[0, 7])


def test_the_screen_is_made_on_first_use_and_counted(screens):
    model = BitNetModel.random(CONFIGS["tied"])
    cache = model.new_cache()
    model.prefill([1, 2], cache)
    model.decode_topk([1], cache, 3001)  # intermediates find their size
    model._engine.head.release_screen()
    before = bx.memory_stats().current
    model.decode([1], cache)
    assert bx.memory_stats().current == before
    model.decode_topk([1], cache, 1)
    wanted = estimate.screen_bytes(3001, model.config.hidden_size)
    assert wanted <= bx.memory_stats().current - before < wanted + 2 * 4096
    assert model._engine.head.release_screen()
    assert not model._engine.head.release_screen()
    assert bx.memory_stats().current == before


def test_threads_share_one_screen(screens):
    model = BitNetModel.random(CONFIGS["tied"])
    found = []

    def run():
        cache = model.new_cache()
        model.prefill([1, 2], cache)
        found.append(model.decode_topk([1], cache, 4))

    workers = [threading.Thread(target=run) for _ in range(4)]
    with bx.DispatchMetrics() as metrics:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert calls(metrics)["screen_pack"] == 1
    assert all(np.array_equal(ids, found[0][0]) for ids, _ in found)


def test_a_memory_limit_without_room_means_the_full_product(screens, no_limit):
    model = BitNetModel.random(CONFIGS["tied"])
    size = estimate.screen_bytes(3001, model.config.hidden_size)
    cache = model.new_cache()
    model.prefill([1, 2], cache)
    with_room, _ = model.decode_topk([1], cache.copy(), 3)
    model._engine.head.release_screen()
    bx.set_memory_limit(bx.memory_stats().current + 2 * size - 100_000)
    with bx.DispatchMetrics() as metrics:
        without, _ = model.decode_topk([1], cache.copy(), 3)
    assert calls(metrics)["vocab_project"] == 1
    assert "screen_pack" not in calls(metrics)
    assert np.array_equal(with_room, without)
    bx.set_memory_limit(bx.memory_stats().current + 2 * size + 1_000_000)
    with bx.DispatchMetrics() as metrics:
        model.decode_topk([1], cache, 3)
    assert calls(metrics)["vocab_screen"] == 1


def test_no_room_for_the_bounds_means_the_full_product(screens, no_limit):
    rng = np.random.default_rng(0)
    head = Head(Table(rng.standard_normal((3000, 32), np.float32), "f32"), None)
    hidden, keep = np.ones((1, 32), np.float32), [np.empty(0, np.int32)]
    out, wanted = np.empty((2, 1, 3000), np.float32)
    head.project_top(hidden, out, 1, keep)  # makes the screen
    head.project(hidden, wanted)
    bx.set_memory_limit(bx.memory_stats().current + 1)
    # A thread of its own has no buffer yet.
    thread = threading.Thread(target=head.project_top, args=(hidden, out, 1, keep))
    with bx.DispatchMetrics() as metrics:
        thread.start()
        thread.join()
    assert calls(metrics)["vocab_project"] == 1
    assert np.array_equal(out, wanted)


def test_a_call_that_needs_the_room_of_a_steps_logits_gets_it(no_limit):
    model = BitNetModel.random(CONFIGS["tied"])
    cache = model.new_cache(100)
    model.prefill([[1]] * 100, cache)
    model.decode_topk([1] * 100, cache, 1)
    logits, output = 4 * 3001 * 100, 4 * 3001 * 60
    bx.set_memory_limit(bx.memory_stats().current + output - logits // 2)
    ids = np.arange(60)
    short = model.forward_full(ids)
    bx.set_memory_limit(None)
    assert np.array_equal(short, model.forward_full(ids))


def test_a_call_that_needs_the_room_gets_it(screens, no_limit):
    model = BitNetModel.random(CONFIGS["tied"])
    cache = model.new_cache()
    model.prefill([1, 2], cache)
    model.decode_topk([1], cache, 1)
    size = estimate.screen_bytes(3001, model.config.hidden_size)
    output = 4 * 3001 * 60
    bx.set_memory_limit(bx.memory_stats().current + output - size // 4)
    ids = np.arange(60)
    short = model.forward_full(ids)
    assert not model._engine.head.release_screen()  # it is gone
    bx.set_memory_limit(None)
    assert np.array_equal(short, model.forward_full(ids))
