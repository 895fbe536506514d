"""Calls whose bits must be the same on every CPU: on every ISA here, and on another architecture.

Inputs come from integers and the demo checkpoint, without a logarithm of the machine's own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

import bitnet_ext as bx
from bitnet_ext import _core

GOLDENS = Path(__file__).parent / "goldens" / "digests.json"
TEXT = "def read_json(path):\n    with open(path) as file:\n        return "


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Multiples of 2^-12 from -4 to 4."""
    values = np.random.default_rng(seed).integers(-(1 << 14), 1 << 14, shape)
    return (values / 4096).astype(np.float32)


def ternary(bits: str) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    weight = bx.PackedTernary.pack(rng.integers(-1, 2, (200, 333), np.int8), 0.03, bits)
    x = numbers(4, 70, 333)
    return [bx.ternary_linear(x[:rows], weight, numbers(5, 200)) for rows in (1, 7, 70)]


def attention(**options: object) -> list[np.ndarray]:
    q, k, v = numbers(1, 2, 4, 70, 40), numbers(2, 2, 2, 600, 40), numbers(3, 2, 2, 600, 24)
    return [bx.attention(q, k, v, **options)]


def rows() -> list[np.ndarray]:
    x, weight, bias = numbers(1, 9, 100), numbers(2, 100), numbers(3, 100)
    cos, sin = _core.rope_table(np.float32([1, 0.25, 0.03125, 1e-3, 1e-4]), 9)
    return [
        bx.rms_norm(x, weight),
        *bx.layer_norm(x, weight, bias, return_stats=True),
        bx.rotary_embedding(x.reshape(1, 10, 9, 10), cos[None], sin[None]),
        _core.log_softmax(x),
    ]


def elementwise() -> list[np.ndarray]:
    x = np.concatenate([numbers(6, 1000) * np.float32(8), np.float32([0, -0.0, 90, -200])])
    found = []
    for op in ("exp", "log", "tanh", "erf", "relu2", "silu", "gelu", "gelu_tanh"):
        found.append(out := np.empty_like(x))
        _core.elementwise(op, np.abs(x) if op == "log" else x, out)
    return found


def vocabulary() -> list[np.ndarray]:
    table = numbers(7, 3000, 100).view(np.uint32) >> 16
    table = table.astype(np.uint16)
    hidden, out = numbers(8, 3, 100), np.empty((3, 3000), np.float32)
    _core.project(hidden, table, "bf16", None, None, out)
    top = np.empty((3, 3000), np.float32)
    screen = _core.VocabScreen(table, "bf16")
    _core.project_top(hidden, table, "bf16", None, screen, 5, [np.empty(0, np.int32)] * 3, top)
    return [out, *_core.topk(top, 5)]


def demo(kv_dtype: str, head: str = "exact") -> list[np.ndarray]:
    model = bx.BitNetModel.from_pretrained("demo", kv_dtype=kv_dtype, head=head)
    ids = np.array(model.tokenizer.encode(TEXT))
    cache = model.new_cache()
    return [
        model.forward_full(ids),
        model.prefill(ids, cache),
        model.decode(ids[:1], cache),
        model.score(ids.tolist()).logprobs,
        np.array(model.generate(TEXT, max_new_tokens=24, temperature=0.8, seed=1).token_ids),
    ]


CASES: dict[str, Callable[[], Iterable[np.ndarray]]] = {
    "ternary 2": lambda: ternary("2"),
    "ternary 1.6": lambda: ternary("1.6"),
    "attention": lambda: attention(causal=True, past_len=530),
    "attention window softcap": lambda: attention(
        kv_lengths=np.array([600, 333]), causal=True, window=(100, 0), softcap=20.0
    ),
    "attention dropout": lambda: attention(dropout_p=0.2, seed=7),
    "rows": rows,
    "elementwise": elementwise,
    "vocabulary": vocabulary,
    "demo": lambda: demo("f32"),
    "demo f16": lambda: demo("f16"),
    "demo int8": lambda: demo("int8", "int8"),
}


def digest(name: str) -> str:
    """Over the bytes of every array, with its dtype and shape."""
    found = hashlib.sha256()
    for array in CASES[name]():
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


if __name__ == "__main__":  # after a change that is meant to change bits
    GOLDENS.write_text(json.dumps({name: digest(name) for name in CASES}, indent=1) + "\n")
