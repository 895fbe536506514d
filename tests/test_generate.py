"""The generation loop: stops, batches, caches, limits; on a scripted model and a real one."""

import dataclasses
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference_sampling as reference
from fake_model import BOS, EOS, EOT, VOCAB, FakeCache, FakeModel, tiny_tokenizer

from bitnet_ext.errors import (
    CacheFullError,
    CheckpointError,
    ContextLengthError,
    InvalidShapeError,
    UnsupportedModelError,
)
from bitnet_ext.generate import GenerationConfig, GenerationOutput, chat, generate
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


# --- prompts and settings ---------------------------------------------------------------------


def test_forms_of_prompts() -> None:
    model = FakeModel()
    one = run(model, HELLO, max_new_tokens=3)
    assert isinstance(one, GenerationOutput)
    for form in (tuple(HELLO), np.array(HELLO), np.array(HELLO, np.uint8)):
        assert run(model, form, max_new_tokens=3).token_ids == one.token_ids
    text = run(model, "hello", max_new_tokens=3)
    assert text.prompt_token_ids == model.tokenizer.encode("hello")
    many = run(model, ["hello", HELLO], max_new_tokens=3)
    assert [o.token_ids for o in many] == [text.token_ids, one.token_ids]
    assert [o.token_ids for o in run(model, np.array([HELLO] * 2), max_new_tokens=3)] == (
        [one.token_ids] * 2
    )
    assert isinstance(run(model, [HELLO], max_new_tokens=3), list)


def test_empty_prompts() -> None:
    model = FakeModel([A, EOS])
    assert run(model, "").prompt_token_ids == [BOS]
    model.tokenizer = tiny_tokenizer(bos=False)
    with pytest.raises(
        InvalidShapeError, match=r"prompts: found no tokens.*puts no token in front"
    ):
        run(model, "")
    with pytest.raises(InvalidShapeError, match=r"prompts: found none"):
        run(model, [])
    with pytest.raises(InvalidShapeError, match=r"prompts\[1\]: found no tokens"):
        run(model, [[A], []])
    with pytest.raises(InvalidShapeError, match=r"prompts\[1\]: found no tokens"):
        run(model, ["a", ""])


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (None, "found NoneType"),
        ({"a": 1}, "found dict"),
        (b"bytes", "found bytes"),
        (5, "found int"),
        ([1.5], "found float64"),
        ([VOCAB], f"found the id {VOCAB}, wanted 0 to {VOCAB - 1}"),
        ([[1], [-1]], r"prompts\[1\]: found the id -1"),
        ([[1], [[2]]], r"prompts\[1\]: found int64 \(1, 1\)"),
        (np.zeros((1, 2, 3), int), r"shape \(1, 2, 3\)"),
        ([True], "found bool"),
    ],
)
def test_prompts_that_are_none(prompts: Any, message: str) -> None:
    cache = FakeCache(1, 64)
    cache.tokens[0] += HELLO
    with pytest.raises(InvalidShapeError, match=message):
        run(FakeModel(), prompts, cache=cache)
    assert cache.tokens == [HELLO], "after an error nothing has changed"


def test_precedence_of_settings() -> None:
    model = FakeModel([A] * 60)
    model.generation_config = GenerationConfig.from_file({"max_new_tokens": 7, "top_k": 9})
    assert len(run(model).token_ids) == 7
    assert len(run(model, "hi", GenerationConfig(temperature=0.0)).token_ids) == 7
    assert len(run(model, "hi", GenerationConfig(max_new_tokens=5)).token_ids) == 5
    assert len(run(model, "hi", GenerationConfig(5), max_new_tokens=4).token_ids) == 4
    copy = pickle.loads(pickle.dumps(GenerationConfig(temperature=0.5)))
    assert len(run(model, "hi", copy).token_ids) == 7
    with pytest.raises(TypeError, match="unknown option 'max_tokens', wanted one of max_new"):
        run(model, max_tokens=3)
    with pytest.raises(TypeError, match="found dict, wanted GenerationConfig"):
        run(model, "hi", {"max_new_tokens": 3})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, wanted an integer of 1 or more"),
        ({"max_new_tokens": 1.5}, "max_new_tokens: found 1.5"),
        ({"max_new_tokens": True}, "max_new_tokens: found True"),
        ({"temperature": -1}, "temperature: found -1, wanted a finite number of 0 or more"),
        ({"temperature": float("nan")}, "temperature: found nan"),
        ({"temperature": float("inf")}, "temperature: found inf"),
        ({"temperature": "1"}, "temperature: found '1'"),
        ({"temperature": None}, "temperature: found None"),
        ({"top_k": -1}, "top_k: found -1"),
        ({"top_p": 1.1}, "top_p: found 1.1, wanted 0 to 1"),
        ({"min_p": -0.1}, "min_p: found -0.1"),
        ({"repetition_penalty": 0}, "repetition_penalty: found 0, wanted a positive number"),
        ({"stop": ""}, "stop: found '', wanted strings of at least one"),
        ({"stop": [1]}, "stop: found 1"),
        ({"stop": 5}, "stop: found 5, wanted a list"),
        ({"stop_token_ids": [-1]}, "stop_token_ids: found -1"),
        ({"stop_token_ids": "ab"}, "stop_token_ids: found 'a'"),
        ({"stop_token_ids": None}, "stop_token_ids: found None"),
        ({"ignore_eos": 1}, "ignore_eos: found 1"),
        ({"min_new_tokens": 200}, "min_new_tokens: found 200, wanted at most max_new_tokens = 128"),
        ({"logprobs": -1}, "logprobs: found -1"),
        ({"seed": -1}, "seed: found -1"),
        ({"seed": 2**64}, "seed: found 18446744073709551616, wanted 0 to"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidShapeError, match=message):
        GenerationConfig(**options)
    with pytest.raises(InvalidShapeError, match=message):
        run(FakeModel(), **options)


def test_numpy_numbers_are_numbers() -> None:
    config = GenerationConfig(max_new_tokens=np.int64(3), temperature=np.float32(0.5))
    assert config == GenerationConfig(max_new_tokens=3, temperature=0.5)
    assert type(config.max_new_tokens) is int


def test_defaults_from_generation_config_json() -> None:
    read = GenerationConfig.from_file
    assert read({}) == GenerationConfig()
    assert read({"temperature": 0.6, "top_p": 0.9}).greedy, "no do_sample, no sampling"
    assert read({"do_sample": True, "temperature": 0.6, "top_p": 0.9}) == (
        GenerationConfig(temperature=0.6, top_p=0.9)
    )
    assert read({"do_sample": True}).temperature == 1.0
    assert read({"stop_strings": "x", "min_p": None, "eos_token_id": 5, "other": {}}).stop == ("x",)
    for bad in ({"top_k": "many"}, {"do_sample": True, "temperature": []}, {"stop_strings": 3}):
        with pytest.raises(CheckpointError, match=r"generation_config.json: \w+: found"):
            read(bad)


@pytest.mark.parametrize("error", [None, UnsupportedModelError("pass token ids")])
def test_models_without_a_tokenizer_take_ids(error: Exception | None) -> None:
    class Bare(FakeModel):
        def __getattribute__(self, name: str) -> Any:
            if name == "tokenizer":
                raise error or CheckpointError("tokenizer: none")
            return super().__getattribute__(name)

    model = Bare([A, EOS])
    model.has_tokenizer = error is not None
    out = run(model, HELLO)
    assert (out.token_ids, out.text) == ([A], "")
    with pytest.raises(CheckpointError):
        run(model, "text")
    with pytest.raises(InvalidShapeError, match="stop: found strings, but the model has no tok"):
        run(model, HELLO, stop="x")


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


# --- caches -----------------------------------------------------------------------------------


def test_cache_holds_prompt_and_text_and_is_reused() -> None:
    model = FakeModel()
    cache = model.new_cache()
    first = run(model, HELLO, cache=cache, max_new_tokens=6, ignore_eos=True)
    held = HELLO + first.token_ids
    assert cache.tokens == [held[:-1]], "the last token is never run"
    model.calls.clear()
    longer = [*held, A, B]
    second = run(model, longer, cache=cache, max_new_tokens=6, ignore_eos=True)
    assert model.calls[0] == ("prefill", [3])
    assert second.timings.prefill_tokens == 3
    cold = run(model, longer, max_new_tokens=6, ignore_eos=True)
    assert cold.token_ids == second.token_ids
    model.calls.clear()
    run(model, HELLO[:3], cache=cache, max_new_tokens=1)
    assert model.calls[0] == ("prefill", [1]), "one token must run to have logits"
    assert cache.tokens == [HELLO[:3]]
    run(model, [D, *HELLO], cache=cache, max_new_tokens=1)
    assert cache.tokens == [[D, *HELLO]]


def test_cache_of_a_batch() -> None:
    model = FakeModel()
    cache = model.new_cache(2)
    run(model, [HELLO, [A]], cache=cache, max_new_tokens=3, ignore_eos=True)
    again = [[*cache.tokens[0], B], [A, C]]
    model.calls.clear()
    out = run(model, again, cache=cache, max_new_tokens=3, ignore_eos=True)
    assert model.calls[0] == ("prefill", [1, 1])
    assert [o.token_ids for o in out] == [
        run(model, p, max_new_tokens=3, ignore_eos=True).token_ids for p in again
    ]
    with pytest.raises(InvalidShapeError, match="cache: found 2 sequences, wanted 1"):
        run(model, HELLO, cache=cache)


@pytest.mark.parametrize("error", [KeyboardInterrupt, CacheFullError, MemoryError])
@pytest.mark.parametrize("fail_at", [0, 1, 2, 5])
def test_errors_leave_the_cache_as_it_was(
    error: type[BaseException], fail_at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop_module, "PREFILL_CHUNK", 2)
    model = FakeModel()
    cache = model.new_cache()
    cache.tokens[0] += HELLO

    def failing(name: str) -> Callable[..., Any]:
        plain = getattr(model, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if len(model.calls) == fail_at:
                raise error("now")
            return plain(*args, **kwargs)

        return call

    for name in ("prefill", "decode"):
        monkeypatch.setattr(model, name, failing(name))
    with pytest.raises(error):
        run(model, [*HELLO, A, B, C, D], cache=cache, ignore_eos=True, max_new_tokens=9)
    assert cache.tokens == [HELLO]


def test_close_during_prefill_returns_within_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop_module, "PREFILL_CHUNK", 2)
    model = FakeModel()
    cache = model.new_cache()
    cache.tokens[0] += HELLO
    inside, closed = threading.Event(), threading.Event()
    plain = model.prefill

    def prefill(*args: Any, **kwargs: Any) -> None:
        plain(*args, **kwargs)
        inside.set()
        assert closed.wait(10)

    monkeypatch.setattr(model, "prefill", prefill)
    stream = run(model, [*HELLO, *[A] * 20], cache=cache, stream=True)
    chunks: list[Any] = []
    worker = threading.Thread(target=lambda: chunks.extend(stream))
    worker.start()
    assert inside.wait(10)
    stream.close()
    closed.set()
    worker.join(10)
    assert not worker.is_alive()
    assert chunks == []
    assert len(model.calls) == 1
    assert cache.tokens == [HELLO]


# --- chat -------------------------------------------------------------------------------------


def test_chat_uses_the_template_and_the_cache() -> None:
    model = FakeModel([*b"ZQ", EOT])  # no merges join them to the text before
    cache = model.new_cache()
    messages = [{"role": "user", "content": "hi"}]
    first = chat(model, messages, cache=cache)
    assert isinstance(first, GenerationOutput)
    assert first.text == "ZQ"
    assert model.tokenizer.decode(first.prompt_token_ids) == "User: hiAssistant: "
    assert first.prompt_token_ids[0] == BOS
    assert BOS not in first.prompt_token_ids[1:]
    messages += [{"role": "assistant", "content": "ZQ"}, {"role": "user", "content": "yo"}]
    second = chat(model, messages, cache=cache)
    assert isinstance(second, GenerationOutput)
    known = len([*first.prompt_token_ids, *b"ZQ"])  # the stop id was never run
    assert second.timings.prefill_tokens == len(second.prompt_token_ids) - known
    streamed = chat(model, messages, stream=True)
    assert "".join(chunk.text for chunk in streamed) == second.text


def test_chat_refuses_messages_of_the_wrong_kind() -> None:
    with pytest.raises(InvalidShapeError, match="messages: found str"):
        chat(FakeModel(), "hello")
