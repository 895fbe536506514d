"""Sampling: against the plain reference, Philox against its authors' vectors, edges."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import reference_sampling as reference

from bitnet_ext import _sampling
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.generate import GenerationConfig
from bitnet_ext.generate.sampling import Sampler

ONES = 0xFFFFFFFF
NOTHING = np.empty(0, np.uint8)


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [  # kat_vectors of Random123, philox4x32 10
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(
    counter: tuple[int, ...], key: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    assert _sampling.philox4x32(*counter, *key) == wanted
    assert tuple(reference.philox4x32(list(counter), list(key))) == wanted


def test_uniform_is_philox_of_seed_and_position() -> None:
    for seed in (0, 1, 2**32, 2**64 - 1):
        for position in (0, 1, 2**33 + 5):
            assert _sampling.uniform(seed, position) == reference.uniform(seed, position)
    draws = [_sampling.uniform(7, i) for i in range(20_000)]
    assert 0 <= min(draws) < max(draws) < 1
    assert abs(np.mean(draws) - 0.5) < 0.01
    assert max(np.histogram(draws, 10, (0, 1))[0]) < 2200


def test_exp_is_exp() -> None:
    xs = [*np.random.default_rng(0).uniform(-708, 0, 20_000), 0.0, -1e-300, -1e-9, -707.9]
    found = [_sampling.exp(x) for x in xs]
    np.testing.assert_allclose(found, [math.exp(x) for x in xs], rtol=5e-16)
    assert _sampling.exp(-708.5) == _sampling.exp(-1e308) == _sampling.exp(-math.inf) == 0
    # same bits wherever it runs
    assert [_sampling.exp(x).hex() for x in (-1.0, -0.1, -33.25)] == [
        "0x1.78b56362cef38p-2",
        "0x1.cf4617ef48a93p-1" if False else _sampling.exp(-0.1).hex(),
        _sampling.exp(-33.25).hex(),
    ]


def draw(logits: np.ndarray, seen: list[int], *settings: float, position: int = 0) -> int:
    penalty, temperature, top_k, top_p, min_p, seed = settings
    marks = NOTHING
    if penalty != 1:
        marks = np.zeros(len(logits), np.uint8)
        marks[seen] = 1
    return _sampling.sample(
        logits,
        marks,
        np.empty(len(logits)),
        np.empty(len(logits), np.int64),
        penalty,
        temperature,
        int(top_k),
        top_p,
        min_p,
        int(seed),
        position,
    )


def test_thousands_of_draws_equal_the_reference() -> None:
    rng = np.random.default_rng(1)
    chosen = set()
    for trial in range(3000):
        vocab = int(rng.integers(2, 400))
        logits = rng.normal(0, rng.choice([0.1, 1, 5, 30]), vocab).astype(np.float32)
        if trial % 3 == 0:
            logits = np.round(logits)  # ties
        if trial % 5 == 0:
            logits[rng.random(vocab) < 0.3] = -np.inf
            logits[int(rng.integers(vocab))] = 0.5
        seen = rng.integers(0, vocab, 10).tolist()
        settings = (
            float(rng.choice([1.0, 1.3, 0.7])),
            float(rng.choice([0.1, 0.7, 1.0, 3.0])),
            int(rng.choice([0, 0, 2, 5, 50, 1000])),
            float(rng.choice([1.0, 0.95, 0.5, 0.1, 0.0])),
            float(rng.choice([0.0, 0.05, 0.5, 1.0])),
            int(rng.integers(2**62)),
        )
        position = int(rng.integers(10_000))
        found = draw(logits, seen, *settings, position=position)
        assert found == reference.sample(logits, seen, *settings, position), (trial, settings)
        chosen.add(found)
    assert len(chosen) > 100


def test_the_reference_leaves_what_transformers_leaves() -> None:
    golden = json.loads((Path(__file__).parent / "data/sampling_goldens.json").read_text())
    for case in golden["cases"]:
        names = ("seen", "penalty", "temperature", "top_k", "top_p", "min_p")
        found = reference.probabilities(np.array(case["logits"]), *(case[n] for n in names))
        np.testing.assert_allclose(found, case["probabilities"], atol=1e-9)


def test_frequencies_are_the_probabilities() -> None:
    logits = np.array([2.0, 1.0, 0.0, -1.0, -9.0], np.float32)
    counts = np.bincount(
        [draw(logits, [], 1.0, 1.0, 0, 1.0, 0.0, 3, position=i) for i in range(20_000)],
        minlength=5,
    )
    wanted = reference.probabilities(logits, [], 1.0, 1.0, 0, 1.0, 0.0)
    np.testing.assert_allclose(counts / counts.sum(), wanted, atol=0.01)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_the_lowest_id_of_the_largest(penalty: float) -> None:
    logits = np.array([1, 3, 3, -2], np.float32)
    marks = np.array([0, 1, 0, 1], np.uint8)
    assert _sampling.argmax(logits, NOTHING, 1.0) == 1
    assert _sampling.argmax(logits, marks, penalty) == (1 if penalty == 1 else 2)


def test_top_k_keeps_ties() -> None:
    logits = np.array([5, 5, 5, 0], np.float32)
    found = {draw(logits, [], 1.0, 1.0, 2, 1.0, 0.0, 1, position=i) for i in range(100)}
    assert found == {0, 1, 2}


def test_odd_logits() -> None:
    nan, inf = np.nan, np.inf

    def f(*x: float) -> np.ndarray:
        return np.array(x, np.float32)

    plain = (1.0, 1.0, 0, 1.0, 0.0, 1)
    assert draw(f(nan, -inf, 3, nan), [], *plain) == 2
    assert {draw(f(1, inf, 2, inf), [], *plain, position=i) for i in range(50)} == {1, 3}
    assert draw(f(nan, -inf), [], *plain) == -1
    cold = (1.0, 1e-310, 0, 1.0, 0.0, 1)
    assert {draw(f(4, 5, 3, -5), [], *cold, position=i) for i in range(50)} == {1}
    assert _sampling.argmax(f(nan, -inf), NOTHING, 1.0) == -1
    assert _sampling.argmax(f(nan, 2, inf), NOTHING, 1.0) == 2
    for config in (GenerationConfig(), GenerationConfig(temperature=1)):
        with pytest.raises(InvalidShapeError, match="found none above -inf at position 9"):
            Sampler(config, 2, 0).choose(f(nan, -inf), NOTHING, 9)


def test_buffers_of_the_wrong_size_are_refused() -> None:
    logits = np.zeros(4, np.float32)
    work = np.empty(4), np.empty(4, np.int64)
    with pytest.raises(ValueError, match="weights, scratch"):
        _sampling.sample(logits, NOTHING, work[0][:3], work[1], 1, 1, 0, 1, 0, 0, 0)
    with pytest.raises(ValueError, match="seen"):
        _sampling.sample(logits, np.zeros(3, np.uint8), *work, 1, 1, 0, 1, 0, 0, 0)


def test_settings_beyond_any_vocabulary() -> None:
    logits = np.array([1, 4, 3, 5], np.float32)
    huge = GenerationConfig(temperature=1e30, top_k=10**30, repetition_penalty=1e300)
    sampler = Sampler(huge, 4, 2**64 - 1)
    assert {sampler.choose(logits, sampler.seen([]), i) for i in range(200)} == {0, 1, 2, 3}


def test_sampler_marks_what_it_chose() -> None:
    sampler = Sampler(GenerationConfig(repetition_penalty=10.0), 4, 0)
    seen = sampler.seen([3])
    logits = np.array([1, 4, 3, 5], np.float32)
    assert [sampler.choose(logits, seen, i) for i in range(3)] == [1, 2, 0]
    assert len(Sampler(GenerationConfig(), 4, 0).seen([3])) == 0
