"""Bits per byte by one rule: BOS, then windows of the whole context that do not overlap."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from demo_recipe.corpus import Text
from demo_recipe.model import Model


@torch.no_grad()
def token_losses(model: Model, ids: list[int], window: int) -> Tensor:
    """-ln p of ids[1:] (ids[0] is BOS); each window of ``window`` inputs starts afresh.

    Inputs ids[i*window : (i+1)*window] predict ids[i*window+1 : (i+1)*window+1].
    """
    tokens = torch.tensor(ids)
    losses = []
    for start in range(0, len(ids) - 1, window):
        inputs = tokens[start : min(start + window, len(ids) - 1)]
        targets = tokens[start + 1 : start + 1 + len(inputs)]
        losses.append(F.cross_entropy(model.logits(inputs[None])[0], targets, reduction="none"))
    return torch.cat(losses)


def bits_per_byte(
    model: Model, tokenizer: Tokenizer, texts: list[Text], window: int | None = None
) -> dict[str, Any]:
    """Per file and in all: bits over bytes of the UTF-8 text.  ``model`` has been prepared."""
    window = window or model.shape.context
    files, bits, size = {}, 0.0, 0
    for text in texts:
        ids = tokenizer.encode(text.text).ids
        mine = token_losses(model, ids, window).double().sum().item() / math.log(2)
        length = len(text.text.encode())
        files[text.name] = {
            "sha256": text.digest,
            "tokens": len(ids) - 1,
            "bytes": length,
            "bits_per_byte": mine / length,
        }
        bits, size = bits + mine, size + length
    return {"total": bits / size, "files": files}
