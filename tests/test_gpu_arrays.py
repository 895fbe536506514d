"""Arrays of a device wherever the model and the host's ops take arrays."""

import sys
from types import ModuleType

import numpy as np
import pytest
from dlpack_cases import calls, each, unchanged

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.ops.norms import layer_norm_backward

TINY = bx.BitNetConfig.tiny()
IDS = np.array([[1, 5, 9, 4], [7, 3, 2, 8]])


class Foreign:
    """An array on a device, of a library that knows DLPack alone."""

    __module__ = "foreign.core"

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


@pytest.fixture(params=["own", "foreign"])
def there(request, device, monkeypatch):
    """Brings an array to the device: as one of its own, or of another library."""
    if request.param == "own":
        return device.to_device
    monkeypatch.setattr(device, "adopt", lambda a: a.array if isinstance(a, Foreign) else a)
    module = ModuleType("foreign")
    module.from_dlpack = Foreign
    monkeypatch.setitem(sys.modules, "foreign", module)
    return lambda array: Foreign(device.to_device(array))


@pytest.mark.parametrize("name", calls(unchanged))
def test_every_op_gives_back_what_it_took(device, there, name):
    kind = type(there(np.zeros(1)))
    for found, wanted in zip(
        each(calls(there)[name]()), each(calls(unchanged)[name]()), strict=True
    ):
        assert type(found) is kind
        same_bits(device, getattr(found, "array", found), wanted)


def test_a_mask_is_written_where_out_is(device, there):
    out = there(np.ones((3, 5), np.float32))
    assert bx.create_causal_mask(3, 5, device="auto", out=out) is out
    same_bits(device, getattr(out, "array", out), bx.create_causal_mask(3, 5))


def models():
    return [bx.BitNetModel.random(TINY, 3, device=where) for where in ("cpu", "cuda")]


def on_host(device, array):
    return device.to_host(array) if device.owns(array) else array


def same_bits(device, found, wanted):
    assert np.array_equal(on_host(device, found), on_host(device, wanted), equal_nan=True)


def test_token_ids_and_lengths(device, there):
    for model in models():
        wanted = model.forward_full(IDS, lengths=[4, 2])
        lengths = there(np.array([4, 2]))
        same_bits(device, model.forward_full(there(IDS), lengths=lengths), wanted)
        same_bits(device, model.forward_incremental(there(IDS), lengths)[0], wanted[0])
        for ids in ([there(IDS[0]), there(IDS[1, :2])], [IDS[0], there(IDS[1, :2])]):
            for row, part in zip(model.forward_full(ids), (wanted[0], wanted[1, :2]), strict=True):
                same_bits(device, row, part)
        same_bits(device, model.forward_full([there(row) for row in IDS])[0], wanted[0])


def test_steps(device, there):
    for model in models():
        wanted, cache = model.new_cache(2), model.new_cache(2)
        same_bits(device, model.prefill(there(IDS), cache), model.prefill(IDS, wanted))
        for active in ([True, True], [False, True]):
            ids, mask = np.array([5, 6], np.int64), np.array(active)
            found = model.decode(there(ids), cache, active=there(mask))
            same_bits(device, found, model.decode(ids, wanted, active=mask))
        found = model.decode_topk(there(np.array([5, 6], np.int32)), cache, 3)
        for array, expected in zip(found, model.decode_topk([5, 6], wanted, 3), strict=True):
            same_bits(device, array, expected)
        assert cache.length.tolist() == wanted.length.tolist()
        cache.truncate(there(np.array([3, 2])))
        assert cache.length.tolist() == [3, 2]
        cache.truncate(there(np.array(2)))
        cache.select(there(np.array([1])))
        assert cache.length.tolist() == [2]


def test_ids_that_stay_on_the_device_are_not_read(device, there):
    _, model = models()
    cache = model.new_cache(2)
    model.prefill(IDS, cache)
    model.decode(there(np.array([5, 6])), cache)
    assert [held[4:] for held in cache.tokens] == [[-1], [-1]]


def test_an_out_of_another_library(device, there):
    _, model = models()
    out = there(np.empty((2, TINY.vocab_size), np.float32))
    memory = getattr(out, "array", out)
    cache, wanted = model.new_cache(2), model.new_cache(2)
    for step in (model.prefill, lambda ids, *a, **k: model.decode(ids[:, 0], *a, **k)):
        assert step(IDS, cache, out=out) is out
        same_bits(device, memory, step(IDS, wanted))
    whole = there(np.empty((2, 4, TINY.vocab_size), np.float32))
    assert model.forward_full(IDS, out=whole) is whole
    same_bits(device, getattr(whole, "array", whole), model.forward_full(IDS))
    with pytest.raises(InvalidShapeError, match="out: found float32"):
        model.prefill(IDS, cache, out=whole)


def test_prompts_and_scores(device, there):
    for model in models():
        wanted = model.generate(IDS, max_new_tokens=3)
        for prompts in (there(IDS), [there(row) for row in IDS], [IDS[0], there(IDS[1])]):
            found = model.generate(prompts, max_new_tokens=3)
            assert [o.token_ids for o in found] == [o.token_ids for o in wanted]
        assert model.generate(there(IDS[0]), max_new_tokens=3).token_ids == wanted[0].token_ids
        scores = model.score(list(IDS), context=[1, 2])
        for inputs in (there(IDS), [there(row) for row in IDS]):
            found = model.score(inputs, context=there(np.array([1, 2])))
            for one, expected in zip(found, scores, strict=True):
                same_bits(device, one.logprobs, expected.logprobs)
        logprobs, greedy = model.token_logprobs([there(IDS[0])], there(np.array([2])))[0]
        expected = model.token_logprobs([IDS[0]], [2])[0]
        same_bits(device, logprobs, expected[0])
        same_bits(device, greedy, expected[1])


def test_ids_to_keep_and_to_decode(device, there):
    for model in models():
        caches = [model.new_cache(1) for _ in range(2)]
        for cache in caches:
            model.prefill(IDS[:1], cache)
        keep = np.array([3, 4], np.int32)
        found = model.decode_largest([5], caches[0], 1, keep=[there(keep)])
        same_bits(device, found, model.decode_largest([5], caches[1], 1, keep=[keep]))
    tokenizer = bx.BitNetModel.from_pretrained("demo").tokenizer
    ids = tokenizer.encode("def add(a, b):")
    assert tokenizer.decode(there(np.array(ids))) == tokenizer.decode(ids)


def test_lengths_of_masks(device, there):
    wanted = bx.create_batch_causal_mask([2, 3], [5, 4], [3, 1])
    arrays = (there(np.array(values)) for values in ([2, 3], [5, 4], [3, 1]))
    assert np.array_equal(bx.create_batch_causal_mask(*arrays), wanted)
    wanted = bx.create_causal_mask(2, 5, 2)
    for past in (np.array(2), np.array([2, 2])):
        assert np.array_equal(bx.create_causal_mask(2, 5, there(past)), wanted)
    with pytest.raises(InvalidShapeError, match="past_len: found lengths"):
        bx.create_causal_mask(2, 5, there(np.array([2, 3])))


def host_calls(there):
    """Ops on arrays of the host that are given one of the device."""
    rng = np.random.default_rng(0)
    q = rng.standard_normal((2, 2, 3, 4), np.float32)
    x, row = rng.standard_normal((2, 3, 8), np.float32), np.ones(8, np.float32)
    weight = bx.PackedTernary.pack(rng.integers(-1, 2, (6, 8), np.int8), 1.0, bits="2")
    mha = bx.MultiHeadAttention(8, 2)
    mha.load_state_dict({n: rng.standard_normal(s, np.float32) for n, s in mha._shapes().items()})
    mask, lengths = there(np.ones((3, 3), bool)), there(np.array([3, 2]))
    tables, bias = np.ones((2, 3, 2), np.float32), there(np.ones(6, np.float32))
    return {
        "mask": lambda: bx.attention(q, q, q, mask=mask),
        "kv_lengths": lambda: bx.attention(q, q, q, kv_lengths=lengths),
        "seed": lambda: bx.attention(q, q, q, dropout_p=0.5, seed=lengths),
        "k": lambda: bx.attention(q, there(q), q),
        "d_out": lambda: bx.attention_backward(there(q), q, q, q),
        "bias": lambda: bx.ternary_linear(x, weight, bias),
        "weight": lambda: bx.rms_norm(x, there(row)),
        "grad": lambda: layer_norm_backward(there(x), x, row),
        "cos": lambda: bx.rotary_embedding(q, there(tables), tables),
        "x_kv": lambda: mha(x, there(x)),
        "rope": lambda: mha(x, rope=(there(tables[0]), there(tables[0]))),
        "out": lambda: mha(x, out=there(x)),
    } | {"mask ": lambda: mha(x, mask=mask)}


@pytest.mark.parametrize("name", host_calls(lambda array: array))
def test_ops_on_the_host_refuse_arrays_of_a_device(device, there, name):
    with pytest.raises(InvalidShapeError, match=f"^{name.strip()}: found it on a CUDA device"):
        host_calls(there)[name]()
