"""Completions of held-out code: step by step for a whole batch, then judged as Python."""

from __future__ import annotations

import ast
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from demo_recipe.bpe import EOS_ID
from demo_recipe.corpus import Text
from demo_recipe.model import Model


@dataclass(frozen=True)
class Prefix:
    """The head of a top-level function or class, cut at a line's end, and what really follows."""

    name: str
    text: str
    follows: str


def held_out_prefixes(texts: list[Text], count: int, seed: int = 0) -> list[Prefix]:
    """``count`` prefixes of 3 to 24 lines (at most 800 characters), drawn without repetition."""
    found = []
    for text in texts:
        lines = text.text.splitlines(keepends=True)
        for node in ast.parse(text.text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                first, last = node.lineno - 1, node.end_lineno or node.lineno
                for cut in range(first + 3, min(first + 24, last - 2)):
                    head = "".join(lines[first:cut])
                    if len(head) <= 800 and lines[cut - 1].strip():
                        found.append(Prefix(text.name, head, "".join(lines[cut:])))
    return random.Random(seed).sample(found, count)


class Stepper:
    """One token at a time for B sequences; keys and values of all positions are kept."""

    def __init__(self, model: Model, batch: int, length: int) -> None:
        shape = model.shape
        size = (shape.layers, batch, shape.kv_heads, length, shape.head_dim)
        self.model, self.keys, self.values = model, torch.zeros(size), torch.zeros(size)
        self.position = 0

    @torch.no_grad()
    def step(self, ids: Tensor) -> Tensor:
        """int64 [B] -> float32 [B, V]."""
        model, t = self.model, self.position
        x = F.embedding(ids, model.embed)
        for i in range(model.shape.layers):
            a = self._attention(model._norm(x, "attn_norm", i), i, t)
            x = x + model._linear(model._norm(a, "attn_sub_norm", i), "o", i)
            f = model._ffn(model._norm(x, "ffn_norm", i), i)
            x = x + model._linear(model._norm(f, "ffn_sub_norm", i), "down", i)
        self.position += 1
        h = F.rms_norm(x, x.shape[-1:], model.norms["norm"], model.shape.eps)
        return h @ model.embed.t()

    def _attention(self, x: Tensor, layer: int, t: int) -> Tensor:
        model, shape = self.model, self.model.shape
        qkv = model._linear(x, "qkv", layer).view(len(x), -1, 1, shape.head_dim)
        q, k, v = qkv.split((shape.heads, shape.kv_heads, shape.kv_heads), 1)
        self.keys[layer, :, :, t] = self._turn(k, t)[:, :, 0]
        self.values[layer, :, :, t] = v[:, :, 0]
        keys, values = self.keys[layer, :, :, : t + 1], self.values[layer, :, :, : t + 1]
        y = F.scaled_dot_product_attention(self._turn(q, t), keys, values, enable_gqa=True)
        return y.reshape(len(x), -1)

    def _turn(self, x: Tensor, t: int) -> Tensor:
        low, high = x.chunk(2, -1)
        return x * self.model.cos[t] + torch.cat((-high, low), -1) * self.model.sin[t]


def complete(
    model: Model,
    tokenizer: Tokenizer,
    prefixes: list[Prefix],
    new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> list[list[int]]:
    """New token ids of each prefix, up to the end token: greedy at temperature 0."""
    rows = [tokenizer.encode(p.text).ids for p in prefixes]
    length = max(map(len, rows)) + new_tokens
    done = [list(r) for r in rows]
    generator = torch.Generator().manual_seed(seed)
    stepper = Stepper(model, len(rows), length)
    for t in range(length - 1):
        logits = stepper.step(torch.tensor([r[t] if t < len(r) else EOS_ID for r in done]))
        if temperature > 0:
            p = torch.softmax(logits / temperature, -1)
            chosen = torch.multinomial(p, 1, generator=generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        for row, start, token in zip(done, rows, chosen.tolist(), strict=True):
            if len(row) == t + 1 and len(row) < len(start) + new_tokens and row[-1] != EOS_ID:
                row.append(token)
    return [d[len(r) :] for d, r in zip(done, rows, strict=True)]


def repeated_4grams(ids: list[int]) -> float:
    """The share of 4-grams of tokens that already occurred in the same completion."""
    grams = [tuple(ids[i : i + 4]) for i in range(len(ids) - 3)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def parses(prefix: str, completion: str) -> bool:
    """Whether prefix + completion is Python once an unfinished end is cut off.

    The last, partial line goes; then whole lines go from the end, at most half of those completed
    (an open bracket or a header without its body), until ast.parse accepts the rest.
    """
    lines = completion.splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    for keep in range(len(lines), (len(lines) - 1) // 2, -1):
        try:
            ast.parse(prefix + "".join(lines[:keep]))
        except (SyntaxError, ValueError):
            continue
        return True
    return False
