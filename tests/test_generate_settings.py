"""Prompts and settings of generation: accepted forms, precedence, what is refused."""

import pickle
from typing import Any

import numpy as np
import pytest
from fake_model import BOS, EOS, VOCAB, FakeCache, FakeModel, tiny_tokenizer

from bitnet_ext.errors import CheckpointError, InvalidShapeError, UnsupportedModelError
from bitnet_ext.generate import GenerationConfig, GenerationOutput, generate

A = ord("a")
HELLO = [104, 101, 108, 108, 111]


def run(model: Any, prompts: Any = "hi", *args: Any, **options: Any) -> Any:
    return generate(model, prompts, *args, **options)


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
