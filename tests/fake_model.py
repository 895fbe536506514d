"""A model without arithmetic: its logits are a function of the tokens before, or a script.

It keeps the promises of BitNetModel that generation and scoring rest on (shapes, caches, errors),
so that hard cases of streams and stops can be written down token by token.
"""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
from tiny_tokenizer import tokenizer_config, tokenizer_json
from tokenizers import Tokenizer as Backend

from bitnet_ext.errors import CacheFullError
from bitnet_ext.generate import GenerationConfig
from bitnet_ext.generate.chat_template import ChatTemplates
from bitnet_ext.generate.tokenizer import Tokenizer

VOCAB = 320
BOS, EOS, EOT = 317, 318, 319


def tiny_tokenizer(bos: bool = True) -> Tokenizer:
    content, config = tokenizer_json(VOCAB), tokenizer_config()
    if not bos:
        content["post_processor"] = None
    names = {k: config[k] for k in ("bos_token", "eos_token")}
    templates = ChatTemplates(config["chat_template"], "fake")
    return Tokenizer(Backend.from_str(json.dumps(content)), names, templates)


TOKENIZER = tiny_tokenizer()


class FakeCache:
    def __init__(self, batch_size: int, max_seq_len: int) -> None:
        self.max_seq_len = max_seq_len
        self.tokens: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def batch_size(self) -> int:
        return len(self.tokens)

    def truncate(self, n: int | Sequence[int]) -> None:
        keep = [n] * self.batch_size if isinstance(n, int) else n
        for held, length in zip(self.tokens, keep, strict=True):
            del held[length:]


class FakeModel:
    """``script``: the tokens that greedy generation gives after any prompt; None: pseudo-random.

    ``calls`` lists the counts of tokens of each prefill and decode.
    """

    def __init__(self, script: Sequence[int] | None = None, context: int = 64) -> None:
        self.config = SimpleNamespace(
            vocab_size=VOCAB,
            max_position_embeddings=context,
            eos_token_ids=(EOS, EOT),
            bos_token_id=BOS,
        )
        self.device = "cpu"
        self.tokenizer = TOKENIZER
        self.has_tokenizer = True
        self.generation_config = GenerationConfig()
        self.script = script
        self.prompt_length = 0
        self.calls: list[tuple[str, list[int]]] = []

    def new_cache(self, batch_size: int = 1, max_seq_len: int | None = None) -> FakeCache:
        return FakeCache(batch_size, max_seq_len or self.config.max_position_embeddings)

    def row(self, tokens: Sequence[int]) -> np.ndarray:
        """Logits behind ``tokens``."""
        logits = np.random.default_rng(list(tokens)).normal(0, 3, VOCAB).astype(np.float32)
        if self.script is not None:
            logits[self.script[len(tokens) - self.prompt_length]] = 100
        return logits

    def _extend(self, cache: FakeCache, new: list[list[int]], out: np.ndarray) -> None:
        for held, ids in zip(cache.tokens, new, strict=True):
            if len(held) + len(ids) > cache.max_seq_len:
                raise CacheFullError("cache: full")
        for row, held, ids in zip(out, cache.tokens, new, strict=True):
            held += ids
            if ids:
                row[:] = self.row(held)

    def prefill(self, ids: Any, cache: FakeCache, lengths: Any, out: np.ndarray) -> None:
        new = [list(map(int, row[:n])) for row, n in zip(ids, lengths, strict=True)]
        self.calls.append(("prefill", [len(n) for n in new]))
        self.prompt_length = max(len(h) + len(n) for h, n in zip(cache.tokens, new, strict=True))
        self._extend(cache, new, out)
        out[[not n for n in new]] = np.nan

    def decode(self, ids: Any, cache: FakeCache, active: Any, out: np.ndarray) -> None:
        new = [[int(i)] if a else [] for i, a in zip(ids, active, strict=True)]
        self.calls.append(("decode", [len(n) for n in new]))
        self._extend(cache, new, out)

    def decode_largest(
        self,
        ids: Any,
        cache: FakeCache,
        k: int,
        *,
        keep: list[np.ndarray],
        active: Any,
        out: np.ndarray,
    ) -> None:
        """What it promises and no more: the k largest logits and those that equal the last."""
        self.decode(ids, cache, active, out)
        for row, kept, runs in zip(out, keep, active, strict=True):
            if runs:
                others = np.delete(row, kept)
                chosen = row >= np.sort(others)[-min(k, len(others))]
                chosen[kept] = True
                row[~chosen] = -np.inf

    def token_logprobs(
        self, sequences: Sequence[Sequence[int]], first: Sequence[int]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        self.calls.append(("score", [len(s) for s in sequences]))
        found = []
        for ids, begin in zip(sequences, first, strict=True):
            assert 1 <= begin <= len(ids) <= self.config.max_position_embeddings + 1
            rows = [self.row(ids[:at]).astype(np.float64) for at in range(begin, len(ids))]
            logs = [r - r.max() - np.log(np.exp(r - r.max()).sum()) for r in rows]
            picked = [log[token] for log, token in zip(logs, ids[begin:], strict=True)]
            greedy = [int(r.argmax()) == t for r, t in zip(rows, ids[begin:], strict=True)]
            found.append((np.array(picked, np.float32), np.array(greedy, bool)))
        return found
