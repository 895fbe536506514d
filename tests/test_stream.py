"""Streams: the chunks join to the output, whatever stands in the way."""

import random
from typing import Any

import pytest
from fake_model import EOS, TOKENIZER, VOCAB, FakeModel

from bitnet_ext.generate import generate
from bitnet_ext.generate.sequence import StopFinder

EMOJI = TOKENIZER.encode("a🙂b👩‍👩‍👧c", add_special_tokens=False)


def stream(script: list[int], **options: Any) -> tuple[list[Any], Any]:
    """(chunks, output) of the same greedy generation."""
    model = FakeModel([*script, EOS], context=256)
    chunks = list(generate(model, "hi", stream=True, max_new_tokens=200, **options))
    return chunks, generate(model, "hi", max_new_tokens=200, **options)


def check(chunks: list[Any], output: Any) -> None:
    assert "".join(c.text for c in chunks) == output.text
    assert [i for c in chunks for i in c.token_ids] == output.token_ids
    assert [c.finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].finish_reason == output.finish_reason
    assert {c.index for c in chunks} == {0}
    assert all(c.text for c in chunks[:-1]), "a chunk tells of something"


def test_split_characters_come_whole() -> None:
    chunks, output = stream(EMOJI)
    check(chunks, output)
    assert [c.text for c in chunks][:4] == ["a", "🙂", "b", "👩"]
    assert output.text == "a🙂b👩‍👩‍👧c"


def test_a_character_cut_by_the_end() -> None:
    for end in range(1, len(EMOJI)):
        chunks, output = stream(EMOJI[:end])
        check(chunks, output)
        assert output.text == TOKENIZER.decode(EMOJI[:end])


@pytest.mark.parametrize(
    ("stop", "wanted"),
    [
        ("🙂", "a"),
        ("🙂b", "a"),
        ("b👩", "a🙂"),
        ("🙂x", "a🙂b👩‍👩‍👧c"),
        (["c", "👧"], "a🙂b👩‍👩‍"),
        ("\u200d", "a🙂b👩"),
        ("a🙂b👩‍👩‍👧c!", "a🙂b👩‍👩‍👧c"),
    ],
)
def test_stops_that_span_tokens_are_never_shown(stop: Any, wanted: str) -> None:
    chunks, output = stream(EMOJI, stop=stop)
    check(chunks, output)
    assert output.text == wanted


def test_text_that_begins_a_stop_is_held_back_then_told() -> None:
    chunks, output = stream(list(b"xabaabcy"), stop="abc")
    check(chunks, output)
    assert [c.text for c in chunks] == ["x", "ab", "a", ""]
    chunks, output = stream(list(b"xab"), stop="abc")
    check(chunks, output)
    assert output.text == "xab"
    assert chunks[-1].text == "ab"


def test_random_scripts_and_stops() -> None:
    rng = random.Random(0)
    for _ in range(60):
        script = [rng.choice([*b"abc", *EMOJI, rng.randrange(VOCAB - 2)]) for _ in range(25)]
        stops = ["".join(rng.choices("abc🙂\ufffd", k=rng.randrange(1, 4))) for _ in range(2)]
        chunks, output = stream(script, stop=stops, ignore_eos=False)
        check(chunks, output)
        assert not any(s in output.text for s in stops)
        if isinstance(output.stop_reason, str):
            whole = TOKENIZER.decode(script)
            assert whole.startswith(output.text + output.stop_reason)


def test_stop_finder_by_characters_equals_search() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("ab", k=20))
        stop = "".join(rng.choices("ab", k=rng.randrange(1, 6)))
        finder, shown, found = StopFinder([stop]), "", None
        for char in text:
            part, found = finder.push(char)
            shown += part
            if found:
                break
        shown += finder.flush()
        assert shown == text.split(stop)[0]
        assert (found is not None) == (stop in text)


def test_streams_of_a_batch_tell_the_prompt() -> None:
    model = FakeModel()
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 2}
    prompts = ["one", "two and more", "three"]
    outputs = generate(model, prompts, **options)
    texts, ids, ends = [""] * 3, [[], [], []], [0] * 3
    for chunk in generate(model, prompts, stream=True, **options):
        texts[chunk.index] += chunk.text
        ids[chunk.index] += chunk.token_ids
        ends[chunk.index] += chunk.finish_reason is not None
    assert texts == [o.text for o in outputs]
    assert ids == [o.token_ids for o in outputs]
    assert ends == [1, 1, 1]


def test_nothing_runs_before_the_first_chunk_is_asked_for() -> None:
    model = FakeModel()
    stream = generate(model, "hi", stream=True)
    assert model.calls == []
    next(stream)
    assert model.calls[0][0] == "prefill"


def test_closing_a_stream_keeps_what_it_told_of() -> None:
    model = FakeModel([*b"abcdef"])
    cache = model.new_cache()
    stream = generate(model, "hi", stream=True, cache=cache)
    assert next(stream).text + next(stream).text == "ab"
    with pytest.raises(RuntimeError, match="unfinished"):
        stream.outputs()
    stream.close()
    stream.close()
    assert list(stream) == []
    prompt = TOKENIZER.encode("hi")
    assert cache.tokens == [[*prompt, *b"a"]]
    model.calls.clear()
    generate(model, [*prompt, *b"ab"], cache=cache, max_new_tokens=1)
    assert model.calls == [("prefill", [1])]


def test_a_finished_stream_gives_its_outputs() -> None:
    with generate(FakeModel([*b"ab", EOS]), "hi", stream=True) as chunks:
        for _ in chunks:
            pass
        assert chunks.outputs()[0].text == "ab"
