"""Log-probabilities of the CUDA kernel: the CPU's bits."""

import numpy as np
import pytest

from bitnet_ext import _core
from bitnet_ext.gpu.logprob import gather_logprobs


def check(device, logits, targets):
    wanted, first = _core.log_softmax_gather(logits, targets)
    found = device.empty((len(logits),), np.float32)
    greedy = device.empty((len(logits),), np.bool_)
    gather_logprobs(device, device.to_device(logits), device.to_device(targets), found, greedy)
    assert np.array_equal(device.to_host(found).view(np.uint32), wanted.view(np.uint32))
    assert device.to_host(greedy).tolist() == first.tolist()


@pytest.mark.parametrize("vocab", [1, 15, 17, 511, 512, 513, 3000, 16 * 1024 + 700])
def test_logprobs(device, vocab):
    rng = np.random.default_rng(vocab)
    for spread in (1e-3, 1.0, 40.0):
        logits = rng.normal(0, spread, (3, vocab)).astype(np.float32)
        targets = rng.integers(0, vocab, 3).astype(np.int32)
        targets[0] = logits[0].argmax()
        check(device, logits, targets)


def test_ties_and_odd_numbers(device):
    nan, inf = np.nan, np.inf
    logits = np.array(
        [
            [1, 2, 2, 0],
            [1, 2, 2, 0],
            [nan, 1, 2, 3],
            [0, inf, 1, 2],
            [-inf] * 4,
            [-inf, 3, -inf, 2],
            [-inf, 3, -inf, 2],
            [3e38, -3e38, 0, -0.0],
        ],
        np.float32,
    )
    check(device, logits, np.array([1, 2, 3, 1, 0, 1, 0, 1], np.int32))
