"""Scores: what is conditioned on what, windows, and the sums; on a fake model and a real one."""

import math
from typing import Any

import numpy as np
import pytest
from fake_model import BOS, EOS, VOCAB, FakeModel, tiny_tokenizer

from bitnet_ext import score as score_module
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.score import Score, score

IDS = [104, 101, 108, 108, 111]


def expected(model: FakeModel, ids: list[int], first: int = 1) -> np.ndarray:
    """Log-probabilities of ids[first:], each given all before."""
    if first >= len(ids):
        return np.empty(0, np.float32)
    return model.token_logprobs([ids], [first])[0][0]


def one(model: Any, *args: Any, **options: Any) -> Score:
    found = score(model, *args, **options)
    assert isinstance(found, Score)
    return found


def test_text_is_scored_behind_its_bos() -> None:
    model = FakeModel()
    text = "hello world"
    ids = model.tokenizer.encode(text)
    found = one(model, text)
    assert ids[0] == BOS
    np.testing.assert_array_equal(found.logprobs, expected(model, ids))
    np.testing.assert_array_equal(found.token_ids, ids[1:])
    assert found.num_tokens == len(ids) - 1 == len(found.is_greedy)
    assert found.num_bytes == len(text)


def test_sums() -> None:
    found = one(FakeModel(), "naïve 🙂")
    total = found.logprobs.astype(float).sum()
    assert found.total == pytest.approx(total)
    assert found.perplexity == pytest.approx(math.exp(-total / found.num_tokens))
    assert found.bits_per_byte == pytest.approx(-total / math.log(2) / len("naïve 🙂".encode()))
    hopeless = Score(*(np.array([v], t) for v, t in ((1, int), (-900, "f"), (0, bool))), 1)
    assert hopeless.perplexity == math.inf


def test_is_greedy() -> None:
    model = FakeModel()
    ids = list(IDS)
    for _ in range(3):
        ids.append(int(np.argmax(model.row(ids))))
    ids.append((int(np.argmax(model.row(ids))) + 1) % VOCAB)
    assert one(model, ids).is_greedy.tolist()[-4:] == [True, True, True, False]


@pytest.mark.parametrize(
    ("inputs", "add_bos", "ids"),
    [
        ("hello", "auto", [BOS, *b"hello"]),
        ("hello", True, [BOS, *b"hello"]),
        ("hello", False, [*b"hello"]),
        (IDS, "auto", IDS),
        (IDS, True, [BOS, *IDS]),
        (IDS, False, IDS),
        ([BOS, *IDS], True, [BOS, *IDS]),
        ([BOS, *IDS], "auto", [BOS, *IDS]),
        (np.array(IDS), "auto", IDS),
    ],
)
def test_bos(inputs: Any, add_bos: Any, ids: list[int]) -> None:
    model = FakeModel()
    wanted = model.tokenizer.encode("hello", add_special_tokens=False)
    ids = ids if not isinstance(inputs, str) else [*ids[: ids[0] == BOS], *wanted]
    found = one(model, inputs, add_bos=add_bos)
    np.testing.assert_array_equal(found.logprobs, expected(model, ids))
    np.testing.assert_array_equal(found.token_ids, ids[1:])
    text = model.tokenizer.decode(ids[1:])
    assert found.num_bytes == len(text.encode()), "bytes of what was scored"


def test_a_tokenizer_without_bos() -> None:
    model = FakeModel()
    model.tokenizer = tiny_tokenizer(bos=False)
    ids = model.tokenizer.encode("hello")
    np.testing.assert_array_equal(one(model, "hello").token_ids, ids[1:])
    np.testing.assert_array_equal(one(model, "hello", add_bos=True).token_ids, ids)
    model.config.bos_token_id = None
    model.tokenizer.special_tokens.pop("bos_token")
    with pytest.raises(InvalidShapeError, match="add_bos: found True, but the model names no"):
        score(model, "hello", add_bos=True)
    np.testing.assert_array_equal(
        one(model, "hello", context="").logprobs, expected(model, [EOS, *ids])
    )


def test_context_is_read_and_not_scored() -> None:
    model = FakeModel()
    for context, text in (("the quick", " brown"), ("the quick ", "brown"), ("ab", "c")):
        whole = model.tokenizer.encode(context + text)
        found = one(model, text, context=context)
        assert found.num_bytes == len(text)
        assert model.tokenizer.decode(found.token_ids).strip() == text.strip()
        first = len(whole) - found.num_tokens
        np.testing.assert_array_equal(found.logprobs, expected(model, whole, first))
    found = one(model, IDS, context=[1, 2])
    np.testing.assert_array_equal(found.logprobs, expected(model, [1, 2, *IDS], 2))
    found = one(model, IDS, context=[1, 2], add_bos=True)
    np.testing.assert_array_equal(found.logprobs, expected(model, [BOS, 1, 2, *IDS], 3))
    found = one(model, "x", context=[1, 2])
    np.testing.assert_array_equal(found.logprobs, expected(model, [BOS, 1, 2, *b"x"], 3))


def test_empty_context_scores_every_token() -> None:
    model = FakeModel()
    for context in ("", []):
        found = one(model, IDS, context=context)
        np.testing.assert_array_equal(found.logprobs, expected(model, [BOS, *IDS]))
        found = one(model, IDS, context=context, add_bos=False)
        np.testing.assert_array_equal(found.logprobs, expected(model, IDS))


@pytest.mark.parametrize("inputs", ["", [], [[]], [""], np.empty(0, int), [BOS], [5]])
def test_nothing_to_score(inputs: Any) -> None:
    found = score(FakeModel(), inputs)
    found = found[0] if isinstance(found, list) else found
    assert found.num_tokens == 0
    assert found.total == 0
    assert math.isnan(found.perplexity)
    assert math.isnan(found.bits_per_byte)


def test_lists() -> None:
    model = FakeModel()
    texts: list[Any] = ["hello", IDS, "", "a longer text than the others"]
    found = score(model, texts)
    assert isinstance(found, list)
    for text, mine in zip(texts, found, strict=True):
        np.testing.assert_array_equal(mine.logprobs, one(model, text).logprobs)
    contexts = ["x", [3], "z", "w"]
    both = score(model, texts, context=contexts)
    assert isinstance(both, list)
    for text, context, mine in zip(texts, contexts, both, strict=True):
        np.testing.assert_array_equal(mine.logprobs, one(model, text, context=context).logprobs)
    shared = score(model, texts, context="x")
    assert isinstance(shared, list)
    np.testing.assert_array_equal(shared[3].logprobs, one(model, texts[3], context="x").logprobs)
    assert isinstance(score(model, np.array([IDS, IDS])), list)


@pytest.mark.parametrize("stride", [None, 8, 5, 1])
@pytest.mark.parametrize("length", [8, 9, 10, 17, 18, 40])
def test_windows(stride: int | None, length: int) -> None:
    model = FakeModel(context=8)
    ids = np.random.default_rng(length).integers(0, VOCAB, length).tolist()
    found = one(model, ids, stride=stride)
    runs = [n for _, counts in model.calls for n in counts]
    step = stride or 8
    wanted = []
    for at in range(1, length):
        k = max(0, -(-(at - 8) // step))  # the first window that reaches it
        wanted.append(expected(model, ids[k * step : at + 1], at - k * step)[0])
    np.testing.assert_array_equal(found.logprobs, np.array(wanted, np.float32))
    assert max(runs) <= 9
    assert len(runs) == 1 + max(0, -(-(length - 9) // step))


def test_windows_begin_where_the_context_ends() -> None:
    model = FakeModel(context=8)
    ids = list(range(30))
    found = one(model, ids[25:], context=ids[:25], stride=4)
    assert found.num_tokens == 5
    assert len([n for _, counts in model.calls for n in counts]) == 2


def test_windows_run_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_module, "BATCH_TOKENS", 20)
    model = FakeModel(context=8)
    score(model, [IDS, IDS, list(range(40))])
    batches = [counts for _, counts in model.calls]
    assert batches == [[5, 5, 9], [9, 9], [9, 8]]
    assert all(sum(counts) <= 20 for counts in batches)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"inputs": None}, "inputs: found NoneType"),
        ({"inputs": [1.5]}, "inputs: found float64"),
        ({"inputs": [[1], [VOCAB]]}, rf"inputs\[1\]: found the id {VOCAB}"),
        ({"inputs": "x", "context": 5}, "context: found int"),
        ({"inputs": "x", "context": ["a", "b"]}, "found 1 and 2"),
        ({"inputs": ["x"], "context": ["a", "b"]}, "found 1 and 2"),
        ({"inputs": "x", "stride": 0}, "stride: found 0, wanted 1 to 64"),
        ({"inputs": "x", "stride": 65}, "stride: found 65"),
        ({"inputs": "x", "stride": 1.0}, r"stride: found 1\.0"),
        ({"inputs": "x", "add_bos": "yes"}, "add_bos: found 'yes'"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidShapeError, match=message):
        score(FakeModel(), **options)
