"""Memory estimates follow the configuration; the limit and the counters hold."""

import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.memory.workspace import empty_array


@pytest.fixture
def no_limit():
    yield
    bx.set_memory_limit(None)


def test_2b_weights_are_what_a_model_packs():
    config = bx.BitNetConfig.bitnet_2b_4t()
    estimate = bx.estimate_memory(config, 1, 512)
    codes = ("w", "codes", np.zeros((64, 320), np.int8), 64, 320, 1.0, False, None)
    bits = float(_core.PackedTernary.from_sources([codes], "auto").bits)
    packed = 2_084_044_800 * bits / 8
    table = 2 * config.vocab_size * config.hidden_size
    assert estimate.weights == pytest.approx(packed + table, rel=0.01)
    assert estimate.total == sum(
        (estimate.weights, estimate.kv_cache, estimate.activations, estimate.output)
    )


def test_activations_grow_linearly():
    config = bx.BitNetConfig.bitnet_2b_4t()
    at = [bx.estimate_memory(config, 1, t).activations for t in (4096, 8192, 16384)]
    assert at[2] - at[1] == 2 * (at[1] - at[0]) == 8192 * 4 * config.hidden_size


def test_cache_of_all_layers_only_when_incremental():
    config = bx.BitNetConfig.tiny()
    full = bx.estimate_memory(config, 2, 100, "full").kv_cache
    assert bx.estimate_memory(config, 2, 100, "decode").kv_cache == config.num_layers * full
    assert full == 2 * 128 * 2 * config.kv_size * 4
    assert bx.estimate_memory(config, 2, 100, kv_dtype="f16").kv_cache == full // 2


def test_generating_adds_the_screen_of_a_large_vocabulary():
    config = bx.BitNetConfig.bitnet_2b_4t()
    decode, generate = (bx.estimate_memory(config, 1, 512, m) for m in ("prefill", "generate"))
    screen = config.vocab_size * (config.hidden_size + 16)
    assert generate.weights - decode.weights == screen
    assert 12 < (generate.activations - decode.activations) / config.vocab_size < 16
    tiny = bx.BitNetConfig.tiny()
    assert bx.estimate_memory(tiny, 1, 9, "generate") == bx.estimate_memory(tiny, 1, 9, "prefill")


@pytest.mark.parametrize(
    "arguments",
    [{"batch_size": 0}, {"seq_len": 0}, {"mode": "fast"}, {"kv_dtype": "f8"}],
)
def test_bad_arguments(arguments):
    with pytest.raises(InvalidShapeError):
        bx.estimate_memory(bx.BitNetConfig.tiny(), **{"batch_size": 1, "seq_len": 1, **arguments})


def test_devices_that_are_absent():
    with pytest.raises(DeviceUnavailableError):
        bx.estimate_memory(bx.BitNetConfig.tiny(), 1, 1, device="tpu")
    with pytest.raises(DeviceUnavailableError):
        bx.memory_stats("tpu")


def test_counters_follow_buffers():
    before = bx.memory_stats().current
    array = empty_array((1000, 1000))
    held = bx.memory_stats().current - before
    assert 4_000_000 <= held < 4_000_000 + 8192
    assert array.ctypes.data % 64 == 0
    del array
    assert bx.memory_stats().current == before
    assert bx.memory_stats().peak >= before + held
    bx.reset_peak_memory()
    assert bx.memory_stats().peak == before


def test_limit_refuses(no_limit):
    bx.set_memory_limit(bx.memory_stats().current + 100_000)
    assert bx.memory_stats().limit is not None
    with pytest.raises(MemoryError):
        empty_array((1000, 1000), np.int8)
    assert empty_array((10,)).shape == (10,)
    with pytest.raises(ValueError, match="wanted None or a non-negative"):
        bx.set_memory_limit(-1)


def test_empty_arrays_take_nothing():
    assert empty_array((0, 5)).shape == (0, 5)
