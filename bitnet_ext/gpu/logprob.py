"""Log-probabilities of given tokens on a device, with the CPU's bits."""

from __future__ import annotations

from typing import Any

import numpy as np

from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import Device

__all__ = ["gather_logprobs"]

_KERNEL = "gather_logprobs"
_MODULE = Module("logprob.cu", [_KERNEL])
_BLOCK = (512,)  # as in logprob.cu


def gather_logprobs(device: Device, logits: Any, targets: Any, logprobs: Any, greedy: Any) -> None:
    """``logprobs[m]`` = log-softmax of ``logits[m]`` at ``targets[m]``.

    Args:
        logits: float32 [M, V].
        targets: int32 [M], within the rows.
        logprobs: float32 [M].
        greedy: bool [M], whether the target is the first of the row's largest.
    """
    rows, vocab = logits.shape
    args = [logits, targets, logprobs, greedy, np.int32(vocab)]
    device.launch(_MODULE, _KERNEL, (rows,), _BLOCK, args)
