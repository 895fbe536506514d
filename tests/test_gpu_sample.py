"""Tokens and the largest logits that the CUDA kernels choose: the CPU's."""

import numpy as np
import pytest

from bitnet_ext import _core, _sampling
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.sample import Choice, DeviceSampler
from bitnet_ext.gpu.topk import TopK

NOTHING = np.empty(0, np.uint8)


def on_the_cpu(logits, choice, seen, position):
    marks = NOTHING if seen is None else seen
    if choice.greedy:
        return _sampling.argmax(logits, marks, choice.penalty)
    work = np.empty(len(logits)), np.empty(len(logits), np.int64)
    c = choice
    return _sampling.sample(
        *(logits, marks, *work, c.penalty, c.temperature, c.top_k, c.top_p, c.min_p, c.seed),
        position,
    )


def check(device, logits, choice, seen=None, active=None, steps=1):
    """The tokens of ``steps`` choices from the same logits, at positions of each row's own."""
    rows, vocab = logits.shape
    sampler = DeviceSampler(device, rows, vocab, choice)
    marks = None if seen is None else device.to_device(seen)
    chosen = None if active is None else device.to_device(active.astype(np.uint8))
    tokens = device.to_device(np.full(rows, -7, np.int32))
    values = device.to_device(logits)
    host = None if seen is None else seen.copy()
    for step in range(steps):
        positions = np.arange(rows, dtype=np.int32) * 1000 + step
        sampler.choose(values, device.to_device(positions), tokens, marks, chosen)
        wanted = np.full(rows, -7, np.int32)
        for m in range(rows):
            if active is not None and not active[m]:
                continue
            row = None if host is None else host[m]
            wanted[m] = on_the_cpu(logits[m], choice, row, int(positions[m]))
            if host is not None and wanted[m] >= 0:
                host[m, wanted[m]] = 1
        assert device.to_host(tokens).tolist() == wanted.tolist(), (choice, step)
    if host is not None:
        assert np.array_equal(device.to_host(marks), host)


def random_logits(rng, rows, vocab):
    logits = rng.normal(0, rng.choice([0.1, 1, 5, 30]), (rows, vocab)).astype(np.float32)
    if rng.random() < 0.4:
        logits = np.round(logits)  # ties
    if rng.random() < 0.2:
        logits[rng.random((rows, vocab)) < 0.3] = -np.inf
        logits[:, rng.integers(vocab)] = 0.5
    return logits


def random_choice(rng):
    return Choice(
        greedy=False,
        penalty=float(rng.choice([1.0, 1.3, 0.7])),
        temperature=float(rng.choice([0.1, 0.7, 1.0, 3.0])),
        top_k=int(rng.choice([0, 0, 2, 5, 50, 1000])),
        top_p=float(rng.choice([1.0, 0.95, 0.5, 0.1, 0.0])),
        min_p=float(rng.choice([0.0, 0.05, 0.5, 1.0])),
        seed=int(rng.integers(2**64, dtype=np.uint64)),
    )


@pytest.mark.parametrize("trial", range(12))
def test_draws_are_the_cpus(device, trial):
    rng = np.random.default_rng(trial)
    rows, vocab = int(rng.integers(1, 4)), int(rng.choice([1, 7, 300, 1024, 1025, 2600]))
    choice = random_choice(rng)
    seen = (rng.random((rows, vocab)) < 0.1).astype(np.uint8) if choice.penalty != 1 else None
    check(device, random_logits(rng, rows, vocab), choice, seen, steps=2)


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_is_the_lowest_id_of_the_largest(device, penalty):
    rng = np.random.default_rng(3)
    logits = np.round(rng.normal(0, 1, (3, 2100))).astype(np.float32)
    logits[1] = -logits[1].clip(0)  # 0 and -0 are equal
    seen = np.zeros((3, 2100), np.uint8)
    check(device, logits, Choice(greedy=True, penalty=penalty), seen, steps=3)


def test_rows_that_are_not_active_are_left_alone(device):
    rng = np.random.default_rng(4)
    logits = rng.normal(0, 1, (3, 40)).astype(np.float32)
    seen = np.zeros((3, 40), np.uint8)
    active = np.array([True, False, True])
    for greedy in (True, False):
        check(device, logits, Choice(greedy, 1.3, top_k=5, top_p=0.9), seen, active, steps=2)


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_odd_logits(device, top_k, top_p):
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [nan, -inf, 3, nan, nan],
            [1, inf, 2, inf, inf],
            [nan, -inf, nan, -inf, -inf],
            [-0.0, 0, -0.0, 0, -1e-45],
            [5, 5, 5, 0, 5],
            [1e38, -1e38, 3e38, -3e38, 3e38],
        ],
        np.float32,
    )
    check(device, logits, Choice(greedy=True))
    for temperature in (1.0, 1e-310, 1e30):
        check(device, logits, Choice(False, 1.0, temperature, top_k, top_p, seed=5), steps=3)


def test_a_vocabulary_too_large_for_the_sums(device):
    with pytest.raises(InvalidShapeError, match="logits: found 1048577"):
        DeviceSampler(device, 1, (1 << 20) + 1, Choice(greedy=True))
    with pytest.raises(ValueError, match="logits: found 1048577"):
        on_the_cpu(np.zeros((1 << 20) + 1, np.float32), Choice(greedy=False), None, 0)


@pytest.mark.parametrize(
    ("rows", "count", "k"), [(1, 1, 1), (2, 9, 9), (3, 1500, 1), (1, 3000, 50), (2, 1030, 1030)]
)
def test_topk_is_the_cpus(device, rows, count, k):
    rng = np.random.default_rng([rows, count, k])
    finder = TopK(device, rows, count, k)
    for spread in (1.0, 30.0):
        values = np.round(rng.normal(0, spread, (rows, count))).astype(np.float32)
        values[rng.random((rows, count)) < 0.1] = np.nan
        values[0, count // 2] = np.inf
        ids, largest = _core.topk(values, k)
        finder.find(device.to_device(values))
        assert np.array_equal(device.to_host(finder.ids), ids)
        assert np.array_equal(device.to_host(finder.values), largest, equal_nan=True)
