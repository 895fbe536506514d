"""The model against a float64 forward pass, and its own rules: errors, caches, outputs, threads."""

from __future__ import annotations

import pickle
import threading
from dataclasses import replace

import numpy as np
import pytest
from reference_model import reference_forward

import bitnet_ext as bx
from bitnet_ext.api import BitNetModel
from bitnet_ext.errors import CacheFullError, ContextLengthError, InvalidShapeError
from bitnet_ext.model import RandomWeights

TINY = bx.BitNetConfig.tiny()
_GPT2 = replace(
    bx.BitNetConfig.gpt2_small(),
    vocab_size=301,
    hidden_size=96,
    intermediate_size=200,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=32,
    max_position_embeddings=128,
)
FAMILIES = {
    "bitnet": TINY,
    "1bitllm": replace(TINY, hidden_act="silu", num_kv_heads=6),
    "llama": replace(
        TINY,
        hidden_act="silu",
        attn_sub_norm=False,
        ffn_sub_norm=False,
        scale_rule="divide",
        tie_word_embeddings=False,
    ),
    "llama-rms": replace(
        TINY,
        hidden_act="silu",
        attn_sub_norm=False,
        ffn_sub_norm=False,
        scale_rule="divide",
        linear_norm=True,
    ),
    "gpt2": _GPT2,
    "gpt2-rope": replace(_GPT2, position="rope", hidden_act="gelu", rope_theta=10000.0),
    "gpt2-no-ffn-norm": replace(_GPT2, ffn_norm=False, head_bias=True),
    "separate-biases": replace(TINY, attention_bias=True, ffn_bias=True, head_dim=10),
}
# float32 moves x * s by less than this, so no activation can round the other way.
_FLIP = 3e-5


def _ids(seed: int, length: int, vocab: int = TINY.vocab_size) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab, length).tolist()


@pytest.fixture(scope="module")
def model() -> BitNetModel:
    return BitNetModel.random(TINY, seed=3)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_matches_the_float64_forward(name):
    config = FAMILIES[name]
    compared = 0
    for seed in range(24):
        ids = _ids(seed, 3, config.vocab_size)
        reference = reference_forward(RandomWeights(config, seed), ids)
        found = BitNetModel.random(config, seed).forward_full(ids)
        largest = np.abs(reference.logits).max()
        error = np.abs(found - reference.logits).max() / largest
        assert error < 0.05, (seed, error)
        if reference.margin > _FLIP:
            compared += 1
            assert error < 1e-5, (seed, error)
    assert compared >= 3


def test_logits_before_a_changed_token_stay(model):
    ids = _ids(0, 40)
    before = model.forward_full(ids)
    for t in (0, 13, 39):
        changed = list(ids)
        changed[t] = (changed[t] + 1) % TINY.vocab_size
        after = model.forward_full(changed)
        assert np.array_equal(before[:t], after[:t])
        assert not np.array_equal(before[t], after[t])


def test_full_incremental_and_prefill_agree(model):
    ids = _ids(1, 70)
    full = model.forward_full(ids)
    assert np.array_equal(full, model.forward_incremental(ids))
    for chunk in (1, 7, 64, None):
        cache = model.new_cache()
        assert np.array_equal(model.prefill(ids, cache, chunk_size=chunk), full[-1])
        assert cache.length.tolist() == [70]
        assert cache.tokens == [ids]


def test_prefill_continues_a_cache(model):
    ids = _ids(2, 50)
    full = model.forward_full(ids)
    cache = model.new_cache()
    model.prefill(ids[:20], cache)
    assert np.array_equal(model.prefill(ids[20:49], cache), full[48])
    assert np.array_equal(model.decode([ids[49]], cache)[0], full[49])


def test_ragged_batches_equal_each_alone(model):
    sequences = [_ids(i, n) for i, n in enumerate((5, 1, 33, 12))]
    alone = [model.forward_full(s) for s in sequences]
    for found, wanted in zip(model.forward_full(sequences), alone, strict=True):
        assert np.array_equal(found, wanted)
    padded = np.zeros((4, 33), int)
    for row, sequence in zip(padded, sequences, strict=True):
        row[: len(sequence)] = sequence
    lengths = [len(s) for s in sequences]
    batch = model.forward_full(padded, lengths)
    for found, wanted, n in zip(batch, alone, lengths, strict=True):
        assert np.array_equal(found[:n], wanted)
        assert not found[n:].any()
    cache = model.new_cache(4)
    last = model.prefill(padded, cache, lengths)
    assert np.array_equal(last, np.stack([a[-1] for a in alone]))
    incremental = model.forward_incremental(sequences)
    for found, wanted in zip(incremental, alone, strict=True):
        assert np.array_equal(found, wanted)


def test_rows_without_tokens_are_nan_and_untouched(model):
    cache = model.new_cache(3)
    model.prefill([_ids(0, 4), _ids(1, 2), _ids(2, 3)], cache)
    twin = cache.copy()
    logits = model.prefill([[5, 6], [], [7]], cache)
    assert np.isnan(logits[1]).all()
    assert cache.length.tolist() == [6, 2, 4]
    assert np.array_equal(
        model.decode([9, 9, 9], cache, active=[False, True, False])[1],
        model.decode([9, 9, 9], twin, active=[False, True, False])[1],
    )


def test_decode_active_rows_leave_the_others(model):
    cache = model.new_cache(2)
    model.prefill([_ids(0, 4), _ids(1, 6)], cache)
    out = np.full((2, TINY.vocab_size), 7, np.float32)
    model.decode([3, 4], cache, active=[True, False], out=out)
    assert (out[1] == 7).all()
    assert cache.length.tolist() == [5, 6]
    assert np.isnan(model.decode([3, 4], cache, active=[False, True])[0]).all()
    both = model.decode([3, 4], cache, active=[False, False])
    assert np.isnan(both).all()
    assert cache.length.tolist() == [5, 7]


def test_logits_to_keep_and_out(model):
    ids = _ids(4, 30)
    full = model.forward_full(ids)
    assert np.array_equal(model.forward_full(ids, logits_to_keep=3), full[-3:])
    assert np.array_equal(model.forward_full(ids, logits_to_keep=99), full)
    out = np.empty_like(full)
    assert model.forward_full(ids, out=out) is out
    assert np.array_equal(out, full)
    short = model.forward_full([ids, ids[:1]], logits_to_keep=2)
    assert [s.shape[0] for s in short] == [2, 1]
    vector = np.empty(TINY.vocab_size, np.float32)
    assert model.prefill(ids, model.new_cache(), out=vector) is vector
    assert np.array_equal(vector, full[-1])


@pytest.mark.parametrize("limit", [1, 7, 30, 1000])
def test_logits_to_keep_in_blocks(model, monkeypatch, limit):
    sequences = [_ids(4, 30), [], _ids(5, 3), _ids(6, 17), _ids(7, 1)]
    wanted = [logits[-4:] for logits in model.forward_full(sequences)]
    monkeypatch.setattr(model._engine, "_block_limit", lambda *_: limit)
    found = model.forward_full(sequences, logits_to_keep=4)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    first = model.prefill(sequences, model.new_cache(5))
    for row, logits in zip(first, wanted, strict=True):
        np.testing.assert_array_equal(row, logits[-1] if len(logits) else np.full_like(row, np.nan))


def test_decode_topk_is_the_head_of_decode(model):
    cache = model.new_cache(2)
    model.prefill([_ids(0, 4), _ids(1, 6)], cache)
    twin = cache.copy()
    ids, values = model.decode_topk([1, 2], cache, 5)
    logits = model.decode([1, 2], twin)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :5]
    assert np.array_equal(ids, order)
    assert np.array_equal(values, np.take_along_axis(logits, order, 1))


def test_token_logprobs_follow_forward_full(model):
    sequences = [_ids(0, 40), _ids(1, 1), _ids(2, 2)]
    for ids, (logprob, greedy) in zip(sequences, model.token_logprobs(sequences), strict=True):
        logits = model.forward_full(ids).astype(np.float64)[:-1]
        top = logits.max(-1, keepdims=True)
        wanted = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        wanted = np.take_along_axis(wanted, np.array(ids[1:], int)[:, None], 1)[:, 0]
        np.testing.assert_allclose(logprob, wanted, atol=2e-6, rtol=1e-6)
        assert np.array_equal(greedy, logits.argmax(-1) == ids[1:])


@pytest.mark.parametrize("kv_dtype", ["f16", "int8"])
def test_narrow_caches_keep_batch_invariance(kv_dtype):
    ids = _ids(5, 90)
    narrow = BitNetModel.random(TINY, seed=3, kv_dtype=kv_dtype)
    full = narrow.forward_full(ids)
    assert np.array_equal(full, narrow.forward_incremental(ids))
    exact = BitNetModel.random(TINY, seed=3).forward_full(ids)
    assert 0 < np.abs(full - exact).max() < 0.2 * np.abs(exact).max()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "no tokens"),
        ([[]], "no tokens"),
        ([TINY.vocab_size], f"found id {TINY.vocab_size}"),
        ([-1], "found id -1"),
        ([1.5], "float64"),
        (np.zeros((1, 1, 1), int), "shape"),
    ],
)
def test_bad_ids_change_nothing(model, bad, message):
    cache = model.new_cache()
    model.prefill([1, 2], cache)
    for call in (model.forward_full, lambda ids: model.prefill(ids, cache)):
        with pytest.raises(InvalidShapeError, match=message):
            call(bad)
    assert cache.length.tolist() == [2]


def test_full_cache_is_refused_whole(model):
    cache = model.new_cache(2, max_seq_len=8)
    model.prefill([_ids(0, 8), _ids(1, 3)], cache)
    with pytest.raises(CacheFullError, match="holds 8 of 8"):
        model.decode([1, 1], cache)
    with pytest.raises(CacheFullError, match="sequence 1 holds 3 of 8"):
        model.prefill([[], _ids(0, 6)], cache)
    assert cache.length.tolist() == [8, 3]
    model.decode([1, 1], cache, active=[False, True])
    assert cache.length.tolist() == [8, 4]


def test_context_overflow_names_both_numbers():
    model = BitNetModel.random(_GPT2)
    with pytest.raises(ContextLengthError, match=r"found 129.*128"):
        model.forward_full(_ids(0, 129, 301))
    with pytest.raises(ContextLengthError, match=r"found 200.*128"):
        model.new_cache(1, 200)


@pytest.mark.parametrize(
    "out",
    [
        np.empty((3, TINY.vocab_size), np.float64),
        np.empty((4, TINY.vocab_size), np.float32),
        np.empty((3, 2 * TINY.vocab_size), np.float32)[:, ::2],
        "out",
    ],
)
def test_bad_out(model, out):
    with pytest.raises(InvalidShapeError, match="out: found"):
        model.forward_full([1, 2, 3], out=out)


def test_an_interrupted_prefill_keeps_the_cache(model, monkeypatch):
    ids = _ids(6, 60)
    cache = model.new_cache()
    model.prefill(ids[:10], cache)
    run = model._engine.run_block
    calls = []

    def interrupted(workspace, rows, held):
        calls.append(len(rows))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return run(workspace, rows, held)

    monkeypatch.setattr(model._engine, "run_block", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.prefill(ids[10:], cache, chunk_size=8)
    monkeypatch.undo()
    assert cache.length.tolist() == [10]
    assert np.array_equal(model.prefill(ids[10:], cache), model.forward_full(ids)[-1])


def test_truncate_and_select(model):
    a, b = _ids(0, 30), _ids(1, 20)
    cache = model.new_cache(2)
    model.prefill([a, b], cache)
    cache.truncate([12, 20])
    cache.select([1, 0, 0])
    assert cache.tokens == [b, a[:12], a[:12]]
    logits = model.prefill([[3], a[12:], [4]], cache)
    assert np.array_equal(logits[1], model.forward_full(a)[-1])
    assert np.array_equal(logits[0], model.forward_full([*b, 3])[-1])


def test_threads_share_a_model_but_not_a_cache(model):
    ids = [_ids(10 + i, 80) for i in range(2)]
    wanted = [model.forward_full(s)[-1] for s in ids]
    found: dict[int, np.ndarray] = {}

    def run(i: int) -> None:
        for _ in range(5):
            cache = model.new_cache()
            found[i] = model.prefill(ids[i], cache, chunk_size=16)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(np.array_equal(found[i], wanted[i]) for i in range(2))
    cache = model.new_cache()
    with cache._core.lease(), pytest.raises(RuntimeError, match="in use"):
        model.prefill([1], cache)
    assert cache.length.tolist() == [0]
    model.prefill([1], cache)


def test_a_random_model_pickles_as_its_seed(model):
    twin = pickle.loads(pickle.dumps(model))
    assert np.array_equal(twin.forward_full([1, 2]), model.forward_full([1, 2]))
    with pytest.raises(TypeError, match="does not pickle"):
        pickle.dumps(model.new_cache())


def test_metrics_tell_the_mode(model):
    with bx.DispatchMetrics() as metrics:
        model.forward_full([1, 2, 3])
    assert {mode for *_, mode in metrics.as_dict()} == {"full"}
    cache = model.new_cache()
    model.prefill([1, 2], cache)
    with bx.DispatchMetrics() as metrics:
        model.decode([3], cache)
    ops = {op: count.calls for (op, _, _, _), count in metrics.as_dict().items()}
    assert {mode for *_, mode in metrics.as_dict()} == {"incremental"}
    assert ops["ternary_gemv"] == 4 * TINY.num_layers
    assert ops["attention_decode"] == TINY.num_layers


def test_the_int8_head_is_near(model):
    from bitnet_ext.model import load_weights

    ids = _ids(7, 20)
    exact = model.forward_full(ids)
    int8 = BitNetModel(TINY, load_weights(RandomWeights(TINY, 3), "int8")).forward_full(ids)
    assert 0 < np.abs(int8 - exact).max() < 0.02 * np.abs(exact).max()
