"""The generation loop on a scripted model: what is chosen, stops, limits, batches."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import reference_sampling as reference
from fake_model import EOS, EOT, FakeCache, FakeModel

from bitnet_ext.errors import ContextLengthError
from bitnet_ext.generate import GenerationConfig, generate
from bitnet_ext.generate import loop as loop_module

A, B, C, D = b"abcd"
HELLO = [104, 101, 108, 108, 111]


def run(model: Any, prompts: Any = "hi", *args: Any, **options: Any) -> Any:
    return generate(model, prompts, *args, **options)


# --- what is chosen ---------------------------------------------------------------------------


def test_greedy_takes_the_largest_logit() -> None:
    model = FakeModel()
    out = run(model, HELLO, max_new_tokens=8, ignore_eos=True)
    tokens = list(HELLO)
    for _ in range(8):
        tokens.append(int(np.argmax(model.row(tokens))))
    assert out.token_ids == tokens[5:]
    assert out.prompt_token_ids == HELLO
    assert (out.finish_reason, out.stop_reason, out.seed) == ("length", None, None)
    assert out.text == model.tokenizer.decode(out.token_ids) == str(out)
    twin = run(model, HELLO, temperature=2.0, top_k=1, max_new_tokens=8, ignore_eos=True)
    assert dataclasses.replace(twin, timings=out.timings) == out


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7, "seed": 3},
        {"temperature": 1.5, "top_k": 20, "seed": 2**64 - 1},
        {"temperature": 1.0, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.3, "seed": 0},
        {"repetition_penalty": 2.0},
    ],
)
def test_sampling_equals_the_reference_loop(settings: dict[str, Any]) -> None:
    model = FakeModel()
    out = run(model, HELLO, max_new_tokens=20, ignore_eos=True, **settings)
    config = GenerationConfig(**settings)
    tokens = list(HELLO)
    for position in range(5, 25):
        row = model.row(tokens)
        arguments = (config.repetition_penalty, config.temperature, config.top_k, config.top_p)
        tokens.append(
            reference.sample(row, tokens, *arguments, config.min_p, config.seed or 0, position)
        )
    assert out.token_ids == tokens[5:]
    assert out.seed == settings.get("seed")


def test_seeds() -> None:
    model = FakeModel()
    first = run(model, HELLO, temperature=1.0, max_new_tokens=12)
    second = run(model, HELLO, temperature=1.0, max_new_tokens=12)
    assert first.seed != second.seed
    assert first.token_ids != second.token_ids
    again = run(model, HELLO, temperature=1.0, max_new_tokens=12, seed=first.seed)
    assert again.token_ids == first.token_ids
    twins = run(model, [HELLO, [A], HELLO], temperature=1.0, max_new_tokens=12, seed=5)
    assert twins[0].token_ids == twins[2].token_ids != twins[1].token_ids


# --- where it stops ---------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [EOS, EOT])
def test_stop_ids_of_the_model_are_not_returned(stop: int) -> None:
    out = run(FakeModel([A, B, stop]))
    assert (out.token_ids, out.text) == ([A, B], "ab")
    assert (out.finish_reason, out.stop_reason) == ("stop", stop)


def test_stop_ids_of_the_call() -> None:
    out = run(FakeModel([A, B, C]), stop_token_ids=[C])
    assert (out.token_ids, out.stop_reason) == ([A, B], C)
    out = run(FakeModel([A, EOS, B, C]), stop_token_ids=C, ignore_eos=True)
    assert (out.token_ids, out.text, out.stop_reason) == ([A, EOS, B], "ab", C)
    out = run(FakeModel([A, EOS]), stop_token_ids=10**9, max_new_tokens=2)
    assert out.stop_reason == EOS, "an id that the model lacks never comes"


def test_stop_at_once() -> None:
    out = run(FakeModel([EOS]))
    assert (out.token_ids, out.text, out.finish_reason) == ([], "", "stop")


def test_max_new_tokens() -> None:
    out = run(FakeModel([A] * 9), max_new_tokens=3)
    assert (out.text, out.finish_reason, out.stop_reason) == ("aaa", "length", None)
    out = run(FakeModel([A, A, A, EOS]), max_new_tokens=3)
    assert out.finish_reason == "length", "the stop id was never reached"


def test_min_new_tokens_bans_stops() -> None:
    model = FakeModel()
    plain = run(model, HELLO, stop_token_ids=range(250), seed=1, temperature=1.0)
    assert len(plain.token_ids) < 6
    out = run(model, HELLO, stop_token_ids=range(250), min_new_tokens=6, seed=1, temperature=1.0)
    assert len(out.token_ids) >= 6
    assert all(token >= 250 and token not in (EOS, EOT) for token in out.token_ids)
    out = run(FakeModel([A, B, A, B]), stop="b", min_new_tokens=3, max_new_tokens=9)
    assert (out.text, out.stop_reason) == ("aba", "b")


@pytest.mark.parametrize(
    ("stop", "text", "reason"),
    [
        ("c", "ab", "c"),
        (["d", "bc"], "a", "bc"),
        (("abcd",), "", "abcd"),
        ("x", "abcdabcd", None),
        ("dab", "abc", "dab"),
    ],
)
def test_stop_strings_cut_the_text(stop: Any, text: str, reason: str | None) -> None:
    out = run(FakeModel([A, B, C, D, A, B, C, D]), stop=stop, max_new_tokens=8)
    assert (out.text, out.stop_reason) == (text, reason)
    assert out.finish_reason == ("length" if reason is None else "stop")


def test_context_is_the_end() -> None:
    model = FakeModel([A] * 99, context=10)
    out = run(model, [B] * 7, max_new_tokens=50)
    assert (out.text, out.finish_reason) == ("aaa", "length")
    out = run(model, [B] * 9, max_new_tokens=50)
    assert out.text == "a"
    with pytest.raises(ContextLengthError, match=r"found 10 tokens, the model's context is 10"):
        run(model, [B] * 10)
    with pytest.raises(ContextLengthError, match=r"found 5 tokens, the cache's max_seq_len is 5"):
        run(model, [B] * 5, cache=FakeCache(1, 5))
    assert run(model, [B] * 4, cache=FakeCache(1, 5)).text == "a"


# --- batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 4, "top_k": 40}])
def test_a_batch_gives_what_each_gives_alone(settings: dict[str, Any]) -> None:
    model = FakeModel()
    prompts = [[A], HELLO, [B] * 20, HELLO[:2]]
    settings |= {"stop_token_ids": range(0, 300, 9), "max_new_tokens": 30}
    alone = [run(model, prompt, **settings) for prompt in prompts]
    assert len({len(o.token_ids) for o in alone}) > 1, "they must stop at different times"
    model.calls.clear()
    batch = run(model, prompts, **settings)
    for one, other in zip(alone, batch, strict=True):
        assert dataclasses.replace(one, timings=other.timings) == other
    worked = sum(sum(counts) for kind, counts in model.calls if kind == "decode")
    assert worked == sum(len(o.token_ids) - (o.finish_reason == "length") for o in alone), (
        "finished sequences cost nothing"
    )


def test_long_prompts_run_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "PREFILL_CHUNK", 8)
    model = FakeModel()
    prompts = [[A] * 3, [B] * 21, [C] * 4]
    batch = run(model, prompts, max_new_tokens=4, ignore_eos=True)
    chunks = [counts for kind, counts in model.calls if kind == "prefill"]
    assert chunks == [[3, 5, 0], [0, 8, 0], [0, 8, 0], [0, 0, 4]]
    assert batch[0].timings.prefill_tokens == 28
    monkeypatch.undo()
    whole = run(model, prompts, max_new_tokens=4, ignore_eos=True)
    assert [o.token_ids for o in batch] == [o.token_ids for o in whole]


def test_timings() -> None:
    out = run(FakeModel([A] * 9), HELLO, max_new_tokens=6)
    assert (out.timings.prefill_tokens, out.timings.decode_tokens) == (5, 5)
    assert out.timings.prefill_tokens_per_second > 0
    assert out.timings.decode_tokens_per_second > 0
    out = run(FakeModel([A] * 9), HELLO, max_new_tokens=1)
    assert out.timings.decode_tokens == out.timings.decode_tokens_per_second == 0
