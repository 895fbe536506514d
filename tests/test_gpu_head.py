"""The screened head of a model on a device: decode_topk and generation give what the CPU gives."""

import dataclasses

import numpy as np
import pytest
from hot_path import hot

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.generate import GenerationConfig
from bitnet_ext.generate.device import DeviceSteps
from bitnet_ext.gpu.screen import most_largest
from bitnet_ext.memory import estimate
from bitnet_ext.model.load import RandomWeights, load_weights

VOCAB = 700
CONFIG = dataclasses.replace(bx.BitNetConfig.tiny(), vocab_size=VOCAB, num_layers=1)
BIASED = dataclasses.replace(CONFIG, head_bias=True, tie_word_embeddings=False)
PROMPTS = [[1, 5, 9, 4], [7, 3], [2, 8, 8, 1, 4]]


@pytest.fixture(autouse=True)
def screens(monkeypatch):
    """Every table is large enough for a screen."""
    monkeypatch.setattr(estimate, "_DEVICE_SCREEN_ELEMENTS", 1)


def pair(config=CONFIG):
    return tuple(bx.BitNetModel.random(config, 3, device=d) for d in ("cpu", "cuda"))


def launched(metrics):
    """Calls of each op of the device."""
    return {op: count.calls for (op, *_), count in metrics.as_dict().items()}


@pytest.mark.parametrize("config", [CONFIG, BIASED], ids=["tied", "bias"])
@pytest.mark.parametrize("k", [1, 4, most_largest(VOCAB), most_largest(VOCAB) + 1])
def test_decode_topk_is_the_cpus(device, config, k):
    cpu, gpu = pair(config)
    caches = [model.new_cache(3, 8) for model in (cpu, gpu)]
    for model, cache in zip((cpu, gpu), caches, strict=True):
        model.prefill(PROMPTS, cache)
    with bx.DispatchMetrics() as metrics:
        found = gpu.decode_topk([1, 2, 3], caches[1], k)
    assert ("screen" in launched(metrics)) == (k <= most_largest(VOCAB))
    for one, other in zip(found, cpu.decode_topk([1, 2, 3], caches[0], k), strict=True):
        assert np.array_equal(device.to_host(one), other)


def test_decode_largest_keeps_ids_and_leaves_inactive_rows(device):
    cpu, gpu = pair()
    caches = [model.new_cache(3, 8) for model in (cpu, gpu)]
    for model, cache in zip((cpu, gpu), caches, strict=True):
        model.prefill(PROMPTS, cache)
    active = np.array([True, False, True])
    keep = [np.array(ids, np.int32) for ids in ([5, 699], [1], [])]
    wrong = [np.array([700], np.int32)] * 3
    with pytest.raises(InvalidShapeError, match="keep: found id 700, wanted 0 to 699"):
        gpu.decode_largest([1, 2, 3], caches[1], 2, keep=wrong)
    out = device.to_device(np.full((3, VOCAB), 7, np.float32))
    assert gpu.decode_largest([1, 2, 3], caches[1], 2, keep=keep, active=active, out=out) is out
    found, full = device.to_host(out), cpu.decode([1, 2, 3], caches[0], active=active)
    assert (found[1] == 7).all()
    for row in (0, 2):
        shown = found[row] > -np.inf
        assert np.array_equal(found[row, shown], full[row, shown])
        assert shown[keep[row]].all()
        others = np.delete(np.arange(VOCAB), keep[row])
        assert shown[others[np.argsort(full[row, others])[-2:]]].all()
        assert not shown.all()
    assert caches[1].length.tolist() == [5, 2, 6]


GENERATION = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.4},
    "reward": {"repetition_penalty": 0.6},
    "top_k": {"temperature": 0.9, "top_k": 7, "top_p": 0.9, "seed": 5},
    "top_k, reward": {"temperature": 0.9, "top_k": 5, "repetition_penalty": 0.5, "seed": 2},
}


@pytest.mark.parametrize("options", GENERATION)
def test_generation_gives_the_tokens_of_the_cpu(device, options):
    cpu, gpu = pair()
    settings = {"max_new_tokens": 6, "ignore_eos": True, **GENERATION[options]}
    wanted = cpu.generate(PROMPTS, **settings)
    with bx.DispatchMetrics() as metrics:
        found = gpu.generate(PROMPTS, **settings)
    assert launched(metrics)["screen"] > 0
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]


@pytest.mark.parametrize("duplicates", [2, 40, VOCAB])
def test_generation_among_equal_rows(device, duplicates):
    """Logits tie in groups: the lowest id wins, and top-k keeps all that equal the k-th."""
    source = RandomWeights(CONFIG, 1)
    table = source.table("embed")
    table.data[:] = table.data[np.arange(VOCAB) // duplicates * duplicates]
    source.table = lambda name: table
    weights = load_weights(source)
    cpu, gpu = (bx.BitNetModel(CONFIG, weights, device=d) for d in ("cpu", "cuda"))
    for more in ({}, {"repetition_penalty": 1.1}, {"temperature": 1.0, "top_k": 5, "seed": 1}):
        wanted, found = (m.generate(PROMPTS, max_new_tokens=4, **more) for m in (cpu, gpu))
        assert [o.token_ids for o in found] == [o.token_ids for o in wanted]


@pytest.mark.parametrize("options", [{"logprobs": 2}, {"temperature": 1.0}])
def test_other_choices_read_every_logit(device, options):
    _, gpu = pair()
    with bx.DispatchMetrics() as metrics:
        gpu.generate(PROMPTS, max_new_tokens=3, seed=1, **options)
    assert "screen" not in launched(metrics)


@pytest.mark.hot_path
def test_screening_is_part_of_the_step(device, monkeypatch):
    _, gpu = pair()
    cache = gpu.new_cache(2, 32)
    logits = gpu.prefill([[1, 2, 3], [4]], cache)
    seen = [np.zeros(VOCAB, np.uint8)] * 2
    steps = DeviceSteps(gpu, cache, GenerationConfig(repetition_penalty=1.2), 9, seen, 1)
    steps.keep([0, 1], logits)
    tokens = steps.first()
    for _ in range(2):
        tokens = steps.next(np.ones(2, bool), tokens)
    with hot(device, monkeypatch):
        for _ in range(3):
            steps._step.run()
    assert device.to_host(steps._step.cache.lengths).tolist() == [8, 6]


def test_small_int8_and_odd_tables_have_no_screen(device, monkeypatch):
    weights = load_weights(RandomWeights(BIASED, 1))
    assert weights.head.dtype == "bf16"
    weights.head.data[699, 3] = 0x7FC0  # NaN
    odd = bx.BitNetModel(BIASED, weights, device="cuda")._engine.head
    assert odd.top(1, 1) is None
    assert odd.top(1, 1) is None
    assert not odd.release_screen()
    int8 = bx.BitNetModel.from_pretrained("demo", device="cuda", head="int8")._engine.head
    assert int8.top(1, 1) is None
    size = VOCAB * CONFIG.hidden_size
    for least, wanted in ((size + 1, False), (size, True)):
        monkeypatch.setattr(estimate, "_DEVICE_SCREEN_ELEMENTS", least)
        head = pair()[1]._engine.head
        assert (head.top(1, 1) is not None) == wanted
        assert head.top(1, 0) is None


def test_memory_is_counted_and_given_back(device):
    _, gpu = pair()
    head, width = gpu._engine.head, CONFIG.hidden_size
    cache = gpu.new_cache(1, 8)
    gpu.prefill([1, 2], cache)
    gpu.decode([1], cache)
    before = bx.memory_stats("cuda").current
    gpu.decode_topk([1], cache, 1)
    wanted = estimate.screen_bytes(VOCAB, width, "cuda")
    assert 0 <= bx.memory_stats("cuda").current - before - wanted < 3 * 512  # CuPy's rounding
    assert head.release_screen()
    assert not head.release_screen()
    assert bx.memory_stats("cuda").current == before
    try:
        bx.set_memory_limit(before + 2 * wanted - 1, device="cuda")
        assert head.top(1, 1) is None
        bx.set_memory_limit(before + 2 * wanted, device="cuda")
        assert head.top(1, 1) is not None
        bx.set_memory_limit(before + wanted + 1000, device="cuda")
        assert head.top(64, 1) is None  # no room for the lists
    finally:
        bx.set_memory_limit(None, device="cuda")


def test_a_prefill_takes_the_screens_memory(device):
    """Rather than run smaller blocks."""
    _, gpu = pair()
    gpu.decode_topk([1], gpu.new_cache(1, 8), 1)
    cache, ids = gpu.new_cache(1, 80), np.arange(80)
    wanted = device.to_host(gpu.prefill(ids, cache))
    cache.truncate(0)
    bx.set_memory_limit(bx.memory_stats("cuda").current + 20_000, device="cuda")
    try:
        assert np.array_equal(device.to_host(gpu.prefill(ids, cache)), wanted)
    finally:
        bx.set_memory_limit(None, device="cuda")
    assert not gpu._engine.head.release_screen()
