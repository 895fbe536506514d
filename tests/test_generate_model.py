"""Generation and scores of the real engine: the bits of forward_full, whatever the way there."""

import gc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import make_hf
from make_gguf import make_gguf

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.generate import loop as loop_module

PROMPTS = [[5, 6, 7], [9], list(range(20, 150)), [5, 6, 8]]
SAMPLED: dict[str, Any] = {"temperature": 1.1, "top_k": 60, "top_p": 0.95, "seed": 11}


@pytest.fixture(scope="module")
def model() -> bx.BitNetModel:
    return bx.BitNetModel.random(bx.BitNetConfig.tiny(), seed=1)


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> bx.BitNetModel:
    return bx.BitNetModel.from_pretrained(make_hf(tmp_path_factory.mktemp("hf")).path)


def ids(model: bx.BitNetModel, prompt: list[int], **options: Any) -> list[int]:
    found: list[int] = model.generate(prompt, **options).token_ids
    return found


def test_greedy_follows_forward_full(model: bx.BitNetModel) -> None:
    tokens = list(PROMPTS[0])
    for _ in range(12):
        tokens.append(int(np.argmax(model.forward_full(tokens)[-1])))
    out = model.generate(PROMPTS[0], max_new_tokens=12, ignore_eos=True)
    assert out.token_ids == tokens[3:]
    assert out.text == "", "a model of random weights has no tokenizer"


@pytest.mark.parametrize("options", [{}, SAMPLED, {**SAMPLED, "repetition_penalty": 1.3}])
def test_a_batch_gives_what_each_gives_alone(model: bx.BitNetModel, options: Any) -> None:
    options = {"max_new_tokens": 24, "ignore_eos": True, **options}
    endless = [ids(model, p, **options) for p in PROMPTS]
    options["stop_token_ids"] = [endless[0][4], endless[2][9]]
    alone = [ids(model, p, **options) for p in PROMPTS]
    assert [o.token_ids for o in model.generate(PROMPTS, **options)] == alone
    assert len({len(a) for a in alone}) > 1, "they must stop at different times"


def test_chunks_of_the_prompt_change_nothing(
    model: bx.BitNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model.generate(PROMPTS, max_new_tokens=6, logprobs=3)
    monkeypatch.setattr(loop_module, "PREFILL_CHUNK", 7)
    chunked = model.generate(PROMPTS, max_new_tokens=6, logprobs=3)
    for a, b in zip(whole, chunked, strict=True):
        assert (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)


def test_logprobs_are_log_softmax_of_forward_full(model: bx.BitNetModel) -> None:
    prompt = PROMPTS[2]
    out = model.generate(prompt, logprobs=5, max_new_tokens=10, ignore_eos=True, **SAMPLED)
    logits = model.forward_full(prompt + out.token_ids)[len(prompt) - 1 : -1]
    exact = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    logs = _core.log_softmax(logits)
    assert len(out.logprobs) == 10
    for found, row, token in zip(out.logprobs, logs, out.token_ids, strict=True):
        order = np.lexsort((np.arange(len(row)), -row))[:5]
        assert found.logprob == row[token]
        assert found.top_ids == tuple(order)
        assert found.top_logprobs == tuple(row[order])
    np.testing.assert_allclose(logs, exact, atol=2e-5)
    own = model.generate(prompt, logprobs=0, max_new_tokens=10, ignore_eos=True, **SAMPLED)
    assert [o.logprob for o in own.logprobs] == [o.logprob for o in out.logprobs]
    assert own.logprobs[0].top_ids == ()


def test_banned_stops_leave_the_logprobs_alone(model: bx.BitNetModel) -> None:
    plain = model.generate(PROMPTS[0], max_new_tokens=1, logprobs=2, ignore_eos=True)
    likeliest = plain.token_ids[0]
    banned = model.generate(
        PROMPTS[0], max_new_tokens=1, min_new_tokens=1, logprobs=2, stop_token_ids=[likeliest]
    )
    assert banned.token_ids[0] == plain.logprobs[0].top_ids[1]
    assert banned.logprobs[0].top_ids == plain.logprobs[0].top_ids


def test_a_warm_cache_gives_the_bits_of_a_cold_start(model: bx.BitNetModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 9, "logprobs": 4, "ignore_eos": True}
    cache = model.new_cache()
    first = model.generate(PROMPTS[2], cache=cache, **options)
    assert int(cache.length[0]) == len(PROMPTS[2]) + 8
    turn = [*PROMPTS[2], *first.token_ids, 3, 4, 5]
    warm = model.generate(turn, cache=cache, **options)
    cold = model.generate(turn, **options)
    assert warm.timings.prefill_tokens == 4
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
    other = [*PROMPTS[2][:50], 1, 2, 3]
    warm, cold = model.generate(other, cache=cache, **options), model.generate(other, **options)
    assert warm.timings.prefill_tokens == 3
    assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)


def test_interrupted_prefill_leaves_the_cache(
    model: bx.BitNetModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "PREFILL_CHUNK", 32)
    cache = model.new_cache()
    model.generate(PROMPTS[2], cache=cache, max_new_tokens=1)
    before = list(cache.tokens[0])
    blocks, plain = [], model._engine.run_block

    def run_block(*args: Any) -> np.ndarray:
        blocks.append(1)
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return plain(*args)

    monkeypatch.setattr(model._engine, "run_block", run_block)
    with pytest.raises(KeyboardInterrupt):
        model.generate([*before, *range(100, 250)], cache=cache)
    assert cache.tokens == [before]
    assert cache.length.tolist() == [len(before)]
    monkeypatch.undo()
    longer = [*before, 7]
    assert ids(model, longer, cache=cache, max_new_tokens=4) == ids(model, longer, max_new_tokens=4)


def test_modes_are_chosen_by_the_work(model: bx.BitNetModel) -> None:
    def modes(metrics: bx.DispatchMetrics, op: str) -> dict[str, int]:
        found = metrics.as_dict().items()
        return {mode: row.calls for (name, _, _, mode), row in found if name == op}

    with bx.DispatchMetrics() as metrics:
        model.generate(PROMPTS[2], max_new_tokens=5, ignore_eos=True)
    assert modes(metrics, "vocab_project") == {"full": 1, "incremental": 4}
    with bx.DispatchMetrics() as metrics:
        model.score(PROMPTS[2])
    assert set(modes(metrics, "vocab_project")) == {"full"}


def test_threads_with_their_own_caches(model: bx.BitNetModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "ignore_eos": True, **SAMPLED}
    alone = [ids(model, p, **options) for p in PROMPTS]
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        together = list(pool.map(lambda p: ids(model, p, **options), PROMPTS))
    assert together == alone


def test_tokens_cost_no_new_memory(model: bx.BitNetModel) -> None:
    cache = model.new_cache()
    peaks = []
    with model.generate(
        [3] * 10, stream=True, cache=cache, max_new_tokens=50, ignore_eos=True
    ) as stream:
        assert list(stream)
    gc.collect()  # what tests before this one left must not be freed in its middle
    held = bx.memory_stats().current
    for _ in range(20):
        bx.reset_peak_memory()
        model.generate([3] * 10, cache=cache, max_new_tokens=50, ignore_eos=True)
        peaks.append(bx.memory_stats().peak)
    assert bx.memory_stats().current == held
    assert len(set(peaks)) == 1


# --- score ------------------------------------------------------------------------------------


def test_score_is_log_softmax_of_forward_full(model: bx.BitNetModel) -> None:
    tokens = np.random.default_rng(0).integers(0, 331, 300).tolist()
    found: Any = model.score(tokens)
    logs = _core.log_softmax(model.forward_full(tokens[:-1]))
    np.testing.assert_array_equal(found.logprobs, logs[np.arange(299), tokens[1:]])
    np.testing.assert_array_equal(found.is_greedy, logs.argmax(-1) == tokens[1:])
    assert found.num_bytes is None
    many: Any = model.score([tokens, tokens[:9], tokens[40:]])
    np.testing.assert_array_equal(many[0].logprobs, found.logprobs)
    np.testing.assert_array_equal(many[1].logprobs, found.logprobs[:8])
    part: Any = model.score(tokens[100:], context=tokens[:100])
    np.testing.assert_array_equal(part.logprobs, found.logprobs[99:])


def test_score_in_windows_equals_windows_by_hand(tmp_path: Path) -> None:
    short = bx.BitNetModel.from_pretrained(make_hf(tmp_path / "m", max_position_embeddings=16).path)
    tokens = np.random.default_rng(1).integers(0, 320, 50).tolist()
    found: Any = short.score(tokens)
    logs = []
    for low in range(0, 49, 16):
        rows = _core.log_softmax(short.forward_full(tokens[low : min(low + 16, 49)]))
        logs += [row[t] for row, t in zip(rows, tokens[low + 1 :], strict=False)]
    np.testing.assert_array_equal(found.logprobs, logs)
    with pytest.raises(bx.errors.ContextLengthError, match=r"found 50 tokens.* context is 16"):
        short.generate(tokens)
    assert short.generate(tokens[:14]).finish_reason == "length"


def test_greedy_text_scores_as_greedy(hf: bx.BitNetModel) -> None:
    out = hf.generate("the quick", max_new_tokens=12, ignore_eos=True, logprobs=0)
    found: Any = hf.score(out.token_ids, context=out.prompt_token_ids)
    assert found.is_greedy.all()
    assert found.logprobs.tolist() == [step.logprob for step in out.logprobs]


# --- checkpoints with tokenizers --------------------------------------------------------------


def test_text_of_a_checkpoint(hf: bx.BitNetModel) -> None:
    out = hf.generate("the quick", max_new_tokens=20, ignore_eos=True, **SAMPLED)
    assert out.prompt_token_ids == hf.tokenizer.encode("the quick")
    assert str(out) == out.text == hf.tokenizer.decode(out.token_ids)
    stream = hf.generate("the quick", stream=True, max_new_tokens=20, ignore_eos=True, **SAMPLED)
    assert "".join(chunk.text for chunk in stream) == out.text
    assert stream.outputs()[0].token_ids == out.token_ids
    assert set(hf.config.eos_token_ids) == {318, 319}, "config.json and generation_config.json"


def test_conversation_in_one_cache(hf: bx.BitNetModel) -> None:
    cache = hf.new_cache()
    messages = [{"role": "user", "content": "hello"}]
    for _ in range(3):
        warm = hf.chat(messages, cache=cache, max_new_tokens=8, logprobs=2)
        cold = hf.chat(messages, max_new_tokens=8, logprobs=2)
        assert (warm.text, warm.token_ids, warm.logprobs) == (
            cold.text,
            cold.token_ids,
            cold.logprobs,
        )
        messages += [{"role": "assistant", "content": warm.text}]
        messages += [{"role": "user", "content": "and then"}]
    assert warm.timings.prefill_tokens < cold.timings.prefill_tokens


def test_gguf_generates_as_its_twin(tmp_path: Path) -> None:
    made = make_gguf(tmp_path / "m.gguf", weights="tq2_0")
    model = bx.BitNetModel.from_pretrained(made.path)
    assert model.has_tokenizer
    out = model.generate("the quick", max_new_tokens=6)
    assert out.prompt_token_ids[0] == model.tokenizer.bos_token_id
    assert model.chat([{"role": "user", "content": "hi"}], max_new_tokens=2).token_ids is not None


def test_random_models_have_no_tokenizer(model: bx.BitNetModel) -> None:
    assert not model.has_tokenizer
    with pytest.raises(bx.errors.CheckpointError, match="pass ids"):
        model.generate("text")
    assert model.generation_config == bx.GenerationConfig()
