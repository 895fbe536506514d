"""Caches across generations: what is kept, reused and put back; conversations."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
from fake_model import BOS, EOT, FakeModel

from bitnet_ext.errors import CacheFullError, InvalidShapeError
from bitnet_ext.generate import GenerationOutput, chat, generate
from bitnet_ext.generate import loop as loop_module

A, B, C, D = b"abcd"
HELLO = [104, 101, 108, 108, 111]


def run(model: Any, prompts: Any = "hi", *args: Any, **options: Any) -> Any:
    return generate(model, prompts, *args, **options)


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


def test_two_streams_in_one_cache_are_refused() -> None:
    model = FakeModel([A] * 30)
    cache = model.new_cache()
    first = run(model, HELLO, cache=cache, stream=True)
    next(first)
    second = run(model, [B, C], cache=cache, stream=True)
    next(second)
    with pytest.raises(RuntimeError, match="in use by another generation"):
        next(first)
    assert cache.tokens == [[B, C]], "the second goes on"
    assert next(second).text == "a"


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
