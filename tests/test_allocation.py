"""A step allocates nothing: neither counted memory, nor arrays, nor pages of the system."""

import json

import fresh
import pytest

STEPS = """
import dataclasses, json, os, resource, tracemalloc
import numpy as np
import bitnet_ext as bx

WARM, STEPS = 10, 50  # within the first page of keys and values
# The smallest table of this width that has a screen; a row of logits takes 128 pages.
model = bx.BitNetModel.random(
    dataclasses.replace(bx.BitNetConfig.tiny(), vocab_size=1 << 17, hidden_size=64, num_layers=2)
)
found = {}

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def probed(step):
    calls = 0

    def run(*arguments, **options):
        nonlocal calls
        result = step(*arguments, **options)
        calls += 1
        if calls == WARM:
            bx.reset_peak_memory()
            tracemalloc.reset_peak()
            found["counted"] = bx.memory_stats().current
            found["arrays"] = tracemalloc.get_traced_memory()[0]
            found["faults"] = faults()
        elif calls == WARM + STEPS:
            found["faults"] = faults() - found["faults"]
            found["arrays"] = tracemalloc.get_traced_memory()[1] - found["arrays"]
            found["counted"] = bx.memory_stats().peak - found["counted"]
        return result

    return run

def steps(step, **options):
    cache, ids = model.new_cache(3), np.arange(3)
    model.prefill(ids[:, None], cache)
    step = probed(step)
    for _ in range(WARM + STEPS):
        step(ids, cache, **options)

def decode(**options):
    steps(model.decode, out=np.empty((3, model.config.vocab_size), np.float32), **options)

def generate(**options):
    model.decode_largest = probed(model.decode_largest)
    options = {"max_new_tokens": WARM + STEPS + 1, "ignore_eos": True, **options}
    return model.generate([[1], [2], [3]], **options)

def generate_some():
    first, *others = (output.token_ids for output in generate())
    (stop, *_) = [id for id in first[:WARM] if id not in others[0] + others[1]]
    del model.decode_largest
    lengths = [len(output.token_ids) for output in generate(stop_token_ids=(stop,))]
    assert lengths[0] < WARM < WARM + STEPS < lengths[1] == lengths[2]

tracemalloc.start()
{
    "decode": decode,
    "decode some": lambda: decode(active=np.array([True, False, True])),
    "decode_topk": lambda: steps(model.decode_topk, k=5),
    "generate": generate,
    "generate some": generate_some,
}[os.environ["WAY"]]()
print(json.dumps(found))
"""


@pytest.mark.parametrize(
    "way", ["decode", "decode some", "decode_topk", "generate", "generate some"]
)
def test_fifty_steps_within_a_page_allocate_nothing(way):
    found = json.loads(fresh.output(STEPS, WAY=way))
    assert found["counted"] == 0
    assert found["arrays"] < 32 << 10  # small objects; a row of logits has 512 KiB
    if not fresh.SANITIZED:
        assert found["faults"] < 50, found
