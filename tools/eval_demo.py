"""Judge the trained demo and its float twin on the held-out modules; write the figures as JSON.

    python tools/eval_demo.py --work W --out tests/goldens/demo_bpb.json [--quick]

Beside bits per byte: xz -9 of the same files, alone, together and primed with the training text,
and Kneser-Ney 5-grams over bytes and over tokens.  --quick leaves out what the models do not
change (those baselines, kept in the work folder) and the completions.
"""

from __future__ import annotations

import argparse
import json
import lzma
from pathlib import Path
from typing import Any

import numpy as np
import torch
from demo_recipe.completion import complete, held_out_prefixes, parses, repeated_4grams
from demo_recipe.corpus import Text, load_part
from demo_recipe.evaluation import bits_per_byte
from demo_recipe.export import load_model
from demo_recipe.model import Model
from demo_recipe.ngram import KneserNey
from tokenizers import Tokenizer

PREFIXES, NEW_TOKENS, TEMPERATURE = 100, 128, 0.8
XZ = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 1 << 27}]  # holds all the training text


def xz_baselines(train: bytes, held_out: list[bytes]) -> dict[str, float]:
    size = sum(map(len, held_out))
    together = b"".join(held_out)
    plain = len(lzma.compress(train, filters=XZ))
    return {
        "each file alone": 8 * sum(len(lzma.compress(h, preset=9)) for h in held_out) / size,
        "files together": 8 * len(lzma.compress(together, preset=9)) / size,
        "primed with the training text": 8
        * (len(lzma.compress(train + together, filters=XZ)) - plain)
        / size,
    }


def ngram_bits(train: list[list[int]], held_out: list[list[int]], alphabet: int, bos: int) -> float:
    """Bits of all held-out sequences under a 5-gram; four ``bos`` stand before each."""
    start = [bos] * 4
    model = KneserNey(np.concatenate([start + t for t in train]).astype(np.int64), 5, alphabet)
    rows = (np.array(start + h, np.int64) for h in held_out)
    return float(sum(model.bits(row).sum() for row in rows))


def baselines(work: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    train, held_out = (load_part(work / "corpus", p) for p in ("train", "held_out"))
    raw = [t.text.encode() for t in held_out]
    size = sum(map(len, raw))

    def tokens(texts: list[Text]) -> list[list[int]]:
        return [e.ids[1:] for e in tokenizer.encode_batch([t.text for t in texts])]

    as_bytes = ngram_bits([list(t.text.encode()) for t in train], [list(r) for r in raw], 256, 0)
    as_tokens = ngram_bits(tokens(train), tokens(held_out), tokenizer.get_vocab_size(), 0)
    return {
        "xz -9": xz_baselines(b"".join(t.text.encode() for t in train), raw),
        "5-gram (interpolated Kneser-Ney)": {
            "bytes": as_bytes / size,
            "tokens": as_tokens / size,
        },
    }


def completions(model: Model, tokenizer: Tokenizer, held_out: list[Text]) -> dict[str, Any]:
    prefixes = held_out_prefixes(held_out, PREFIXES)
    found = {}
    for name, temperature in (("greedy", 0.0), ("sampled", TEMPERATURE)):
        rows = complete(model, tokenizer, prefixes, NEW_TOKENS, temperature)
        found[name] = judge(
            [(p.text, tokenizer.decode(r), r) for p, r in zip(prefixes, rows, strict=True)]
        )
    real = [
        tokenizer.encode(p.follows, add_special_tokens=False).ids[:NEW_TOKENS] for p in prefixes
    ]
    found["real text"] = judge(
        [(p.text, tokenizer.decode(r), r) for p, r in zip(prefixes, real, strict=True)]
    )
    return found


def judge(rows: list[tuple[str, str, list[int]]]) -> dict[str, float]:
    return {
        "repeated 4-grams": sum(repeated_4grams(ids) for _, _, ids in rows) / len(rows),
        "parseable": sum(parses(prefix, text) for prefix, text, _ in rows) / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(args.work / "tokenizer.json"))
    held_out = load_part(args.work / "corpus", "held_out")
    kept = args.work / "baselines.json"
    if not kept.exists() and not args.quick:
        kept.write_text(json.dumps(baselines(args.work, tokenizer)))
    result: dict[str, Any] = {"window": 1024, "rule": "see tools/demo_recipe/evaluation.py"}
    if kept.exists():
        result["baselines"] = json.loads(kept.read_text())
    for name, ternary in (("ternary", True), ("float twin", False)):
        model = load_model(args.work, ternary)
        result[name] = bits_per_byte(model, tokenizer, held_out)
        if not args.quick:
            result[name]["completions"] = completions(model, tokenizer, held_out)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {k: v for k, v in result.items() if k not in ("ternary", "float twin")}
    shown |= {k: {**result[k], "files": "..."} for k in ("ternary", "float twin")}
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
