"""Memory of attention beside its arrays: counted bytes, and peaks of fresh processes (VmHWM)."""

import tracemalloc

import fresh
import numpy as np
import pytest
from attention_op_cases import operands

import bitnet_ext as bx

PEAK = """
import numpy as np, bitnet_ext as bx
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
t = 16384
"""
ATTENTION = """
q = np.ones((1, 8, t, 16), np.float32)
k, v = np.ones((2, 1, 1, t, 16), np.float32)
options = dict(causal=True, window=(100, 0), OPTIONS)
def call(heads):
    return bx.attention(q[:, :heads], k, v, **options)
bx.attention(q[:, :1, :64], k, v, **options)
"""
MULTI_HEAD = """
def layer(heads, kv_heads):
    shapes = {"w_q": heads, "w_k": kv_heads, "w_v": kv_heads, "w_out": heads}
    mha = bx.MultiHeadAttention(16, heads, d_k=16, kv_heads=kv_heads)
    mha.load_state_dict({name: np.ones((n, 16, 16), np.float32) for name, n in shapes.items()})
    return mha
layers = {1: layer(1, 1), 8: layer(8, KV_HEADS)}
x = np.ones((1, t, 16), np.float32)
def call(heads):  # 64 keys are seen, by 32 queries at a time
    return layers[heads](x, mask=np.ones(64, bool), save_peak_mem_factor=512)
layers[1](x[:, :64])
"""
COMPARE = """
start = peak()
call(1)  # whatever is made once
one = call(1)
between = peak()
eight = call(8)
print(between - start - one.nbytes, peak() - between - eight.nbytes)
"""


def peaks(code, **values):
    """What one head needs beside its result, and what eight need more."""
    for name, value in values.items():
        code = code.replace(name, str(value))
    # What is freed goes back at once, so that nothing comes out of the heap unseen.
    env = {"BITNET_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    return map(int, fresh.output(PEAK + code + COMPARE, **env).split())


def test_counted_memory_does_not_grow_with_length():
    """After the first call at a shape, a call 16 times as long takes no more."""
    short, long = (operands(1, 2, 1, t, t, 16, 16) for t in (512, 8192))
    bx.attention(*short, causal=True)
    bx.attention(*long, causal=True, window=(64, 0))
    bx.reset_peak_memory()
    before = bx.memory_stats().peak
    bx.attention(*long, causal=True, window=(64, 0), mask=np.ones(8192, bool), softcap=3.0)
    assert bx.memory_stats().peak == before


@pytest.mark.parametrize(
    "options",
    [
        "",
        "precision='int8'",
        "dropout_p=0.1, seed=1",
        "softcap=3.0",
        "mask=np.ones(t, np.float32)",
        "precision='int8', dropout_p=0.1, seed=1, softcap=3.0, mask=np.ones(t, np.float32)",
    ],
)
def test_peak_memory_is_linear_and_blind_to_shared_heads(options):
    """8 query heads on one KV head cost what one does; scores would be a gigabyte a head."""
    one, more = peaks(ATTENTION, OPTIONS=options)
    assert one < 3 << 20
    assert fresh.SANITIZED or abs(more) < 256 << 10


@pytest.mark.parametrize("dtype", [bool, np.float32])
def test_a_transposed_mask_is_read_where_it_is(dtype):
    q, k, v = operands(1, 2, 1, 1024, 1024, 16, 16)
    mask = np.ones((1024, 1024), dtype).T
    tracemalloc.start()
    try:
        bx.attention(q, k, v, mask=mask)
        bx.attention_backward(np.ones_like(q), q, k, v, mask=mask)
        assert tracemalloc.get_traced_memory()[1] < mask.nbytes / 2
    finally:
        tracemalloc.stop()


def test_peak_memory_of_a_layer_is_blind_to_shared_heads():
    """Beside one head's keys and values of 1 MB each."""
    one, more = peaks(MULTI_HEAD, KV_HEADS=1)
    assert one < 4 << 20
    assert fresh.SANITIZED or abs(more) < 256 << 10
    _, copied = peaks(MULTI_HEAD, KV_HEADS=8)
    assert copied > 12 << 20
