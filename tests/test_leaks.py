"""A thousand calls of each op on arrays leave nothing: counted bytes, and the resident memory of a
fresh process (VmRSS)."""

import fresh
import pytest

CODE = """
import numpy as np, bitnet_ext as bx
from bitnet_ext.ops import norms, rotary
def held():
    for line in open("/proc/self/status"):
        if line.startswith("VmRSS"):
            return bx.memory_stats().current, int(line.split()[1]) * 1024
x, rows = np.ones((2, 3, 40, 8), np.float32), np.ones((2, 40, 24), np.float32)
mask, angles = np.ones((40, 40), bool), np.ones((2, 40, 4), np.float32)
mha = bx.MultiHeadAttention(24, 3)
mha.load_state_dict({name: np.ones((3, 8, 24), np.float32) for name in ("w_q", "w_k", "w_v")}
                    | {"w_out": np.ones((3, 8, 24), np.float32)})
cache = bx.MaskCache(max_entries=10)
def trained():
    mha(rows, training=True)
    mha.backward(rows)
def call(i):
    CALL
for i in range(3000):  # the heap finds its size
    call(i)
before = held()
for i in range(1000):
    call(i)
print(*(b - a for a, b in zip(before, held())))
"""
CALLS = {
    "attention": "bx.attention(x, x, x, causal=True, mask=mask, return_scores='softmax')",
    "attention-int8": "bx.attention(x, x, x, precision='int8', dropout_p=0.1, seed=i)",
    "attention-backward": "bx.attention_backward(x, x, x, x, causal=True, mask=mask)",
    "multi-head": "mha(rows, causal=True, mask=mask, save_peak_mem_factor=2)",
    "multi-head-cached": "mha(rows, cache_kv=True), mha(rows, use_cached_kv=True)",
    "multi-head-backward": "trained()",
    "mask": "bx.create_causal_mask(40, 40 + i % 3)",
    "mask-batch": "bx.create_batch_causal_mask([40, 30], [50, 40 + i % 3])",
    "mask-stream": "list(bx.iter_causal_mask(40, 40 + i % 3, 16))",
    "mask-cache": "cache.get(40, 40 + i % 20), cache.get(40, 40, window=[2, 0])",
    "rms-norm": "bx.rms_norm(x, x[0, 0, 0])",
    "layer-norm": "bx.layer_norm(x, x[0, 0, 0], x[0, 0, 0], return_stats=True)",
    "norm-backward": "norms.layer_norm_backward(x, x, x[0, 0, 0])",
    "rotary": "bx.rotary_embedding(x, angles, angles)",
    "rotary-backward": "rotary.rotary_embedding_backward(x, angles, angles)",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_thousand_calls_leave_nothing(call):
    code = CODE.replace("CALL", CALLS[call])
    counted, resident = map(int, fresh.output(code, BITNET_NUM_THREADS="1").split())
    assert counted == 0
    assert fresh.SANITIZED or resident < 32 << 10  # a small object a call would be more
