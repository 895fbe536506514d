"""A model on a CUDA device: the CPU's bits from every path, and nothing of the host in a step."""

import dataclasses
import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
from cuda_emulator import emulator
from hot_path import TheHost, hot

import bitnet_ext as bx
from bitnet_ext.errors import CacheFullError, DeviceUnavailableError, InvalidShapeError
from bitnet_ext.generate import GenerationConfig
from bitnet_ext.generate.device import DeviceSteps
from bitnet_ext.gpu.quantise import MOST_ROWS
from bitnet_ext.memory.kv_cache import KVCache

TINY = bx.BitNetConfig.tiny()
GPT2 = dataclasses.replace(
    bx.BitNetConfig.gpt2_small(),
    vocab_size=150,
    hidden_size=64,
    intermediate_size=96,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    max_position_embeddings=64,
)
SHAPES = {
    "bitnet": TINY,
    "gpt2": GPT2,
    "norms inside": dataclasses.replace(
        TINY, linear_norm=True, attn_sub_norm=False, ffn_sub_norm=False, num_layers=2
    ),
    "silu": dataclasses.replace(
        TINY, hidden_act="silu", attn_sub_norm=False, tie_word_embeddings=False, num_layers=1
    ),
    "gelu gated": dataclasses.replace(
        TINY, hidden_act="gelu", head_bias=True, fused_qkv=True, num_layers=1
    ),
    "divide": dataclasses.replace(TINY, scale_rule="divide", gated_ffn=False, num_layers=1),
}
PROMPTS = [[1, 5, 9, 4], [7, 3], [2, 8, 8, 1, 4]]


def pair(config=TINY, **options):
    """The same model on the CPU and on the device."""
    return tuple(bx.BitNetModel.random(config, 3, device=d, **options) for d in ("cpu", "cuda"))


def host(device, array):
    return device.to_host(array) if device.owns(array) else array


def same_bits(device, found, wanted):
    found = host(device, found)
    assert found.shape == wanted.shape
    assert np.array_equal(found, wanted, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_path_has_the_bits_of_the_cpu(device, shape):
    cpu, gpu = pair(SHAPES[shape])
    assert (cpu.device, gpu.device) == ("cpu", "cuda")
    ids = np.random.default_rng(1).integers(0, cpu.config.vocab_size, 11)
    wanted = cpu.forward_full(ids)
    found = gpu.forward_full(ids)
    assert device.owns(found)
    same_bits(device, found, wanted)
    cache = gpu.new_cache(1, 16)
    same_bits(device, gpu.prefill(ids[:7], cache, chunk_size=3), wanted[6])
    for at in range(7, 11):
        same_bits(device, gpu.decode(ids[at : at + 1], cache)[0], wanted[at])
    assert cache.length.tolist() == [11]
    assert cache.tokens == [ids.tolist()]


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_narrow_caches(device, kv_dtype):
    cpu, gpu = pair(kv_dtype=kv_dtype)
    ids = np.arange(1, 12)
    wanted = cpu.forward_full(ids)
    same_bits(device, gpu.forward_full(ids), wanted)
    cache = gpu.new_cache(1, 16)
    same_bits(device, gpu.prefill(ids[:9], cache), wanted[8])
    same_bits(device, gpu.decode(ids[9:10], cache)[0], wanted[9])


@pytest.mark.parametrize("precision", ["f16", "bf16"])
@pytest.mark.parametrize("kv_dtype", ["f32", "f16"])
def test_attention_in_half_precision_has_one_answer_too(device, precision, kv_dtype):
    ids = np.random.default_rng(1).integers(0, TINY.vocab_size, 9)
    exact = bx.BitNetModel.random(TINY, 3, kv_dtype=kv_dtype).forward_full(ids)
    gpu = bx.BitNetModel.random(TINY, 3, kv_dtype=kv_dtype, device="cuda", precision=precision)
    whole = host(device, gpu.forward_full(ids))
    assert 0 < abs(whole - exact).max() < 0.05 * abs(exact).max()
    cache = gpu.new_cache(1, 16)
    same_bits(device, gpu.prefill(ids[:7], cache, chunk_size=3), whole[6])
    for at in (7, 8):
        same_bits(device, gpu.decode(ids[at : at + 1], cache)[0], whole[at])


def test_ragged_batches(device):
    cpu, gpu = pair()
    for found, wanted in zip(gpu.forward_full(PROMPTS), cpu.forward_full(PROMPTS), strict=True):
        same_bits(device, found, wanted)
    ids = np.arange(15).reshape(3, 5)
    for options in ({"lengths": [4, 0, 5]}, {"logits_to_keep": 2}, {}):
        same_bits(device, gpu.forward_full(ids, **options), cpu.forward_full(ids, **options))
    out = device.empty((3, 5, TINY.vocab_size), np.float32)
    assert gpu.forward_full(ids, out=out) is out
    same_bits(device, out, cpu.forward_full(ids))
    incremental = gpu.forward_incremental(ids, lengths=[4, 1, 5])
    same_bits(device, incremental[2], cpu.forward_full(ids)[2])


def test_sequences_without_tokens_and_inactive_ones(device):
    cpu, gpu = pair()
    caches = [model.new_cache(4, 16) for model in (cpu, gpu)]
    ids = np.arange(20).reshape(4, 5)
    for lengths in ([0, 3, 0, 5], [2, 0, 1, 0]):
        wanted = cpu.prefill(ids, caches[0], lengths=lengths)
        same_bits(device, gpu.prefill(ids, caches[1], lengths=lengths, chunk_size=4), wanted)
    active = np.array([True, False, True, True])
    tokens = np.array([3, 4, 5, 6])
    wanted = cpu.decode(tokens, caches[0], active=active)
    same_bits(device, gpu.decode(tokens, caches[1], active=active), wanted)
    out = device.to_device(np.full(wanted.shape, 7, np.float32))
    gpu.decode(tokens, caches[1], active=active, out=out)
    wanted = cpu.decode(tokens, caches[0], active=active, out=np.full(wanted.shape, 7, np.float32))
    same_bits(device, out, wanted)
    wanted = cpu.decode(tokens, caches[0])
    same_bits(device, gpu.decode(device.to_device(tokens.astype(np.int32)), caches[1]), wanted)
    assert caches[1].length.tolist() == caches[0].length.tolist()


def test_caches_are_cut_copied_and_reordered(device):
    cpu, gpu = pair()
    caches = [model.new_cache(2, 16) for model in (cpu, gpu)]
    for model, cache in zip((cpu, gpu), caches, strict=True):
        model.prefill([[1, 2, 3], [4]], cache)
        for _ in range(3):  # past the step that is captured
            model.decode([5, 6], cache)
        cache.truncate([2, 3])
    copies = [cache.copy() for cache in caches]
    for order in ([1, 0], [0, 0, 1]):
        for cache in caches:
            cache.select(order)
        tokens = [7, 8, 9][: len(order)]
        wanted = cpu.decode(tokens, caches[0])
        same_bits(device, gpu.decode(tokens, caches[1]), wanted)
    same_bits(device, gpu.decode([7, 8], copies[1]), cpu.decode([7, 8], copies[0]))
    caches[1].reset()
    assert caches[1].length.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.4},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": 5},
        {"temperature": 2.0, "seed": 1, "logprobs": 2, "repetition_penalty": 1.2},
        {"min_new_tokens": 3, "stop_token_ids": (4, 73)},
    ],
)
def test_generation_gives_the_tokens_of_the_cpu(device, options):
    wanted, found = (m.generate(PROMPTS, max_new_tokens=5, **options) for m in pair())
    assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
    assert [o.logprobs for o in found] == [o.logprobs for o in wanted]
    assert [o.finish_reason for o in found] == [o.finish_reason for o in wanted]


def test_generation_reuses_a_cache(device):
    _, gpu = pair()
    cache = gpu.new_cache(1, 32)
    first = gpu.generate([1, 5, 9], cache=cache, max_new_tokens=4, ignore_eos=True)
    assert cache.tokens == [[1, 5, 9, *first.token_ids[:3]]]
    longer = [1, 5, 9, *first.token_ids, 8]
    again = gpu.generate(longer, cache=cache, max_new_tokens=2, ignore_eos=True)
    assert again.timings.prefill_tokens == 2
    assert again.token_ids == gpu.generate(longer, max_new_tokens=2, ignore_eos=True).token_ids


def test_the_largest_logits_and_log_probabilities(device):
    cpu, gpu = pair()
    caches = [model.new_cache(2, 8) for model in (cpu, gpu)]
    for model, cache in zip((cpu, gpu), caches, strict=True):
        model.prefill([[1, 2, 3], [4]], cache)
    for found, wanted in zip(
        gpu.decode_topk([5, 6], caches[1], 7), cpu.decode_topk([5, 6], caches[0], 7), strict=True
    ):
        same_bits(device, found, wanted)
    for found, wanted in zip(gpu.token_logprobs(PROMPTS), cpu.token_logprobs(PROMPTS), strict=True):
        assert all(map(np.array_equal, found, wanted))


def test_the_demo_and_an_int8_head(device):
    for head in ("exact", "int8"):
        cpu, gpu = (
            bx.BitNetModel.from_pretrained("demo", device=d, head=head) for d in ("cpu", "cuda")
        )
        ids = cpu.tokenizer.encode("def main(")[:3]
        wanted = cpu.forward_full(ids)
        cache = gpu.new_cache(1, 8)
        same_bits(device, gpu.prefill(ids[:2], cache), wanted[1])
        same_bits(device, gpu.decode(ids[2:], cache)[0], wanted[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_the_host_keeps_no_matrices(device, shape):
    """But has them again when a file is written."""
    gc.collect()
    before = bx.memory_stats().current
    gpu = bx.BitNetModel.random(SHAPES[shape], 3, device="cuda")
    gc.collect()
    assert bx.memory_stats().current == before
    wanted = bx.BitNetModel.random(SHAPES[shape], 3)._engine.weights
    found = gpu._engine.weights
    for a, b in zip(found.layers, wanted.layers, strict=True):
        for x, y in zip(linears(a), linears(b), strict=True):
            assert np.array_equal(x.weight.unpack(), y.weight.unpack())
            assert np.array_equal(x.weight.scale, y.weight.scale)
            assert x.weight.divide == y.weight.divide
            assert np.array_equal(x.bias, y.bias) if y.bias is not None else x.bias is None
            assert np.array_equal(x.norm.weight, y.norm.weight)
        assert np.array_equal(a.attn_norm.weight, b.attn_norm.weight)
    assert (found.head is found.embedding) == (wanted.head is wanted.embedding)
    for x, y in ((found.embedding, wanted.embedding), (found.head, wanted.head)):
        assert x.dtype == y.dtype
        assert np.array_equal(x.data, y.data)
    assert np.array_equal(found.head_bias, wanted.head_bias)
    assert np.array_equal(found.positions, wanted.positions)


def linears(layer):
    return [*layer.qkv, layer.o, *layer.gate_up, layer.down]


@pytest.mark.hot_path
def test_steps_touch_neither_the_host_nor_the_allocator(device, monkeypatch):
    _, gpu = pair()
    cache = gpu.new_cache(2, 32)
    gpu.prefill([[1, 2, 3], [4]], cache)
    tokens = device.to_device(np.array([5, 6], np.int32))
    out = device.empty((2, TINY.vocab_size), np.float32)
    gpu.decode(tokens, cache, out=out)  # makes room, compiles
    gpu.decode(tokens, cache, out=out)  # is captured
    with hot(device, monkeypatch):
        for _ in range(3):
            gpu.decode(tokens, cache, out=out)
        with pytest.raises(TheHost):
            gpu.decode([5, 6], cache, out=out)
    assert cache.length.tolist() == [8, 6]


@pytest.mark.hot_path
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 5, "top_p": 0.9}])
def test_choosing_is_part_of_the_step(device, monkeypatch, options):
    _, gpu = pair()
    cache = gpu.new_cache(2, 32)
    logits = gpu.prefill([[1, 2, 3], [4]], cache)
    seen = [np.zeros(TINY.vocab_size, np.uint8)] * 2
    steps = DeviceSteps(gpu, cache, GenerationConfig(**options), 9, seen)
    steps.keep([0, 1], logits)
    tokens = steps.first()
    for _ in range(2):
        tokens = steps.next(np.ones(2, bool), tokens)
    step = steps._step
    with hot(device, monkeypatch):
        for _ in range(3):
            step.run()
    assert host(device, step.cache.lengths).tolist() == [8, 6]


@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize(("batch", "each"), [(1, 5), (MOST_ROWS, 5), (MOST_ROWS + 1, 9)])
def test_launches_of_a_layer(device, batch, each, precision):
    """q k v; attention; o; gate and up; down. The norms of more rows come before their products."""
    if not isinstance(device, emulator.EmulatedDevice):
        pytest.skip("a card does not note its launches")
    layers = 3
    config = dataclasses.replace(TINY, num_layers=layers)
    gpu = bx.BitNetModel.random(config, 3, device="cuda", precision=precision)
    cache = gpu.new_cache(batch, 8)
    gpu.prefill([[1]] * batch, cache)
    step = gpu._engine.step(cache)
    device.launches.clear()
    step.run()
    kernels = [launch[0].partition("<")[0] for launch in device.launches]
    assert kernels[0] == "embed"
    assert kernels[-2:] == ["norm_rows", "advance_lengths"]
    layer = kernels[1 : 1 + each]
    assert kernels[1:-2] == layers * layer
    product = ["norm_gemv"] if each == 5 else ["norm_quantise", "ternary_gemv"]
    attention = "attend_step" if precision == "f32" else "attend_half"
    assert layer == [*product, attention, *product, *product, *product]


def test_a_step_is_captured_once(device, monkeypatch):
    _, gpu = pair()
    captured, capture = [], device.capture
    monkeypatch.setattr(device, "capture", lambda work: captured.append(work) or capture(work))
    cache = gpu.new_cache(1, 16)
    for token in range(4):
        gpu.decode([token], cache)
    gpu.decode([9], gpu.new_cache(1, 16))
    assert len(captured) == 1
    cache.select([0])
    for token in range(2):
        gpu.decode([token], cache)
    assert len(captured) == 2


def test_errors_leave_the_cache_as_it_was(device, monkeypatch):
    cpu, gpu = pair()
    cache = gpu.new_cache(1, 5)
    gpu.prefill([1, 2, 3, 4], cache)
    wanted = cpu.forward_full([1, 2, 3, 4, 9])[4]
    with pytest.raises(CacheFullError, match="sequence 0"):
        gpu.prefill([5, 6], cache)
    step = gpu._engine.step(cache)
    with monkeypatch.context() as patch:
        patch.setattr(step, "run", lambda: (type(step).run(step), 1 / 0))
        with pytest.raises(ZeroDivisionError):
            gpu.decode([5], cache)
    assert cache.length.tolist() == [4]
    same_bits(device, gpu.decode([9], cache)[0], wanted)
    with cache._core.lease(), pytest.raises(CacheFullError):
        gpu.decode([9], cache)


def test_memory_that_runs_out_makes_blocks_smaller(device, monkeypatch):
    cpu, gpu = pair()
    ids, rows = np.arange(30), []
    allocate = device.empty

    def empty(shape, dtype):
        if shape[0] > 8 and tuple(shape[1:]) == (TINY.q_size + 2 * TINY.kv_size,):
            raise MemoryError
        rows.append(shape[0])
        return allocate(shape, dtype)

    monkeypatch.setattr(device, "empty", empty)
    same_bits(device, gpu.prefill(ids, gpu.new_cache(1, 32)), cpu.forward_full(ids)[-1])
    assert 8 in rows


def test_what_is_refused(device):
    cpu, gpu = pair()
    with pytest.raises(InvalidShapeError, match="cache: found one on cpu, wanted cuda"):
        gpu.decode([1], cpu.new_cache(1, 8))
    with pytest.raises(InvalidShapeError, match="cache: found one on cuda, wanted cpu"):
        cpu.prefill([1], gpu.new_cache(1, 8))
    with pytest.raises(InvalidShapeError, match="out: found ndarray"):
        gpu.forward_full([1], out=np.empty((1, TINY.vocab_size), np.float32))
    with pytest.raises(InvalidShapeError, match="token_ids: found float32"):
        gpu.decode(device.empty((1,), np.float32), gpu.new_cache(1, 8))
    large = bx.BitNetModel.random(dataclasses.replace(TINY, vocab_size=6000), device="cuda")
    cache = large.new_cache(1, 8)
    with pytest.raises(InvalidShapeError, match="k: found 5000, wanted at most 4096"):
        large.decode_topk([1], cache, 5000)
    assert cache.length.tolist() == [0]
    with pytest.raises(InvalidShapeError, match="precision: found 'f16' on the CPU, wanted 'f32'"):
        bx.BitNetModel.random(TINY, precision="f16")
    with pytest.raises(DeviceUnavailableError, match="found 'tpu', wanted 'cpu', 'cuda' or 'auto'"):
        bx.BitNetModel.random(TINY, device="tpu")


def test_auto_takes_the_device_and_models_pickle(device):
    model = bx.BitNetModel.random(TINY, device="auto")
    assert model.device == "cuda"
    assert pickle.loads(pickle.dumps(model)).device == "cuda"


def test_saved_from_a_device(device, tmp_path: Path):
    model = bx.BitNetModel.from_pretrained("demo", device="cuda")
    model.save_pretrained(tmp_path / "copy")
    again = bx.BitNetModel.from_pretrained(tmp_path / "copy")
    ids = [5, 6, 7]
    same_bits(device, model.prefill(ids, model.new_cache(1, 8)), again.forward_full(ids)[-1])


def test_a_cache_in_use_is_refused(device):
    cache = KVCache(TINY, 1, 8, device=device)
    import threading

    errors = []

    def truncate():
        try:
            cache.truncate(0)
        except RuntimeError as error:
            errors.append(str(error))

    with cache._core.lease():
        thread = threading.Thread(target=truncate)
        thread.start()
        thread.join()
    assert errors == ["cache: in use by another call; give each concurrent call a cache of its own"]
