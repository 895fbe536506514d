"""Memory of a CUDA device: estimates, statistics, limits; and what its metrics count."""

import dataclasses

import numpy as np
import pytest
from idle_device import IdleDevice

import bitnet_ext as bx
import bitnet_ext.gpu.device
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.generate import GenerationConfig
from bitnet_ext.generate.device import DeviceSteps

TINY = bx.BitNetConfig.tiny()
NORMS_INSIDE = dataclasses.replace(
    TINY, linear_norm=True, attn_sub_norm=False, ffn_sub_norm=False, hidden_size=256
)


@pytest.fixture
def idle(monkeypatch):
    device = IdleDevice(90, 132, multiple=512)  # as CuPy's pool rounds sizes
    monkeypatch.setattr(bitnet_ext.gpu.device, "cuda_device", lambda: device)
    return device


def few_layers(config):
    """Two of the layers: each takes what the others do."""
    return dataclasses.replace(config, num_layers=2)


@pytest.mark.parametrize(
    ("config", "batch", "length", "kv_dtype"),
    [
        (bx.BitNetConfig.gpt2_medium(), 8, 1024, "f32"),
        (few_layers(bx.BitNetConfig.gpt2_medium()), 1, 100, "int8"),
        (NORMS_INSIDE, 3, 700, "f16"),
    ],
)
def test_estimates_are_what_calls_take(idle, config, batch, length, kv_dtype):
    model = bx.BitNetModel.random(config, kv_dtype=kv_dtype, device="cuda")
    ids = np.zeros((batch, length), np.int32)

    def close(mode):
        wanted = bx.estimate_memory(config, batch, length, mode, kv_dtype, "cuda").total
        # A full forward gives its intermediates back before it asks for logits.
        assert wanted / 1.2 < bx.memory_stats("cuda").peak < 1.02 * wanted

    bx.reset_peak_memory("cuda")
    assert model.forward_full(ids).shape == (batch, length, config.vocab_size)
    close("full")
    cache = model.new_cache(batch, length)
    bx.reset_peak_memory("cuda")
    model.prefill(ids[:, :-3], cache)
    close("prefill")
    cache.truncate(length - 3)
    bx.reset_peak_memory("cuda")
    model.decode(ids[:, 0], cache)
    close("decode")
    del cache
    cache = model.new_cache(batch, length)
    bx.reset_peak_memory("cuda")
    model.prefill(ids[:, :-3], cache)
    nothing = [np.empty(0, np.uint8)] * batch
    steps = DeviceSteps(model, cache, GenerationConfig(temperature=1.0), 1, nothing, 50)
    steps.next(np.ones(batch, bool), ids[:, 0])
    cache.truncate(0)
    model.prefill(ids[:, :-3], cache)  # the next turn of a chat
    close("generate")


def test_estimates_without_a_device():
    config = bx.BitNetConfig.bitnet_2b_4t()
    cpu, gpu = (bx.estimate_memory(config, 1, 512, device=d) for d in ("cpu", "cuda"))
    two_bits, table = 2_084_044_800 // 4, 2 * config.vocab_size * config.hidden_size
    assert gpu.weights == pytest.approx(two_bits + table, rel=0.01)
    assert (gpu.kv_cache, gpu.output) == (cpu.kv_cache, cpu.output)
    decode, generate = (
        bx.estimate_memory(config, 4, 512, mode, device="cuda") for mode in ("decode", "generate")
    )
    assert generate.activations > decode.activations
    with pytest.raises(InvalidShapeError):
        bx.estimate_memory(config, 1, 1, kv_dtype="f8", device="cuda")
    with pytest.raises(DeviceUnavailableError, match="found 'tpu', wanted 'cpu' or 'cuda'"):
        bx.estimate_memory(config, 1, 1, device="tpu")


def test_statistics_and_the_limit(device):
    bx.reset_peak_memory("cuda")
    before = bx.memory_stats("cuda")
    assert before.limit is None
    held = device.empty((1 << 20,), np.uint8)
    now = bx.memory_stats("cuda")
    assert now.current - before.current == 1 << 20
    del held
    assert bx.memory_stats("cuda").current == before.current
    assert bx.memory_stats("cuda").peak >= now.current
    bx.reset_peak_memory("cuda")
    assert bx.memory_stats("cuda").peak < now.current
    bx.set_memory_limit(now.current + 1000, device="cuda")
    try:
        assert bx.memory_stats("cuda").limit == now.current + 1000
        with pytest.raises(MemoryError):
            device.empty((1 << 21,), np.uint8)
    finally:
        bx.set_memory_limit(None, device="cuda")
    with pytest.raises(DeviceUnavailableError, match="found 'tpu', wanted 'cpu' or 'cuda'"):
        bx.memory_stats("tpu")


def test_a_limit_makes_blocks_smaller_and_changes_no_bit(device):
    ids = np.arange(80)
    model = bx.BitNetModel.random(TINY, device="cuda")
    wanted = device.to_host(model.prefill(ids, model.new_cache(1, 80)))
    cache = model.new_cache(1, 80)
    out = device.empty((TINY.vocab_size,), np.float32)
    bx.reset_peak_memory("cuda")
    used = bx.memory_stats("cuda").current
    bx.set_memory_limit(used + 150_000, device="cuda")
    try:
        model.prefill(ids, cache, out=out)
        assert bx.memory_stats("cuda").peak <= used + 150_000
        bx.reset_peak_memory("cuda")
        bx.set_memory_limit(bx.memory_stats("cuda").current + 100, device="cuda")
        with pytest.raises(MemoryError):
            model.prefill(ids[:1], model.new_cache(1, 80))
    finally:
        bx.set_memory_limit(None, device="cuda")
    assert np.array_equal(device.to_host(out), wanted)


def test_metrics_name_kernels_and_the_device(device):
    model = bx.BitNetModel.random(TINY, device="cuda")
    cache = model.new_cache(1, 8)
    isa = f"sm_{device.capability}"
    with bx.DispatchMetrics() as metrics:
        model.prefill([1, 2, 3], cache)
        model.decode([4], cache)
    counts = metrics.as_dict()
    assert counts["embed", "cuda", isa, "full"].calls == 2  # and the last row of the prompt
    assert counts["embed", "cuda", isa, "incremental"].calls == 1
    project = counts["project", "cuda", isa, "incremental"]
    assert project.calls == 1
    assert project.bytes >= 2 * TINY.vocab_size * TINY.hidden_size
    assert not any(where == "cpu" for _, where, _, _ in counts)
    model.decode([4], cache)
    assert metrics.as_dict() == counts
