"""A small byte-level BPE for test checkpoints: 256 bytes, merges learnt here, three specials."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import pairwise
from typing import Any

SPECIALS = ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
TEXT = (
    "the quick brown fox jumps over the lazy dog and then the other fox asks why there is "
    "something rather than nothing in this small world of ours where all words are counted "
    "def read_json(path): return json.loads(open(path).read()) for line in self.lines: print(line)"
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)


def byte_alphabet() -> list[str]:
    """The printable character that byte-level BPE gives to each byte value, by value."""
    keep = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {b: chr(b) for b in keep}
    for extra, b in enumerate(b for b in range(256) if b not in names):
        names[b] = chr(256 + extra)
    return [names[b] for b in range(256)]


@cache
def learn_merges(count: int) -> tuple[tuple[str, str], ...]:
    """The first ``count`` merges of BPE over TEXT (most frequent pair, ties by order)."""
    alphabet = byte_alphabet()
    words = [
        [alphabet[b] for b in (" " * (i > 0) + w).encode()] for i, w in enumerate(TEXT.split(" "))
    ]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(p for w in words for p in pairwise(w))
        if not pairs:
            raise ValueError(f"TEXT holds only {len(merges)} merges, {count} wanted")
        best = min(pairs, key=lambda p: (-pairs[p], p))
        merges.append(best)
        words = [_merge(w, best) for w in words]
    return tuple(merges)


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for piece in word:
        if out and (out[-1], piece) == pair:
            out[-1] = out[-1] + piece
        else:
            out.append(piece)
    return out


def vocabulary(vocab_size: int) -> tuple[list[str], list[tuple[str, str]]]:
    """All tokens by id (bytes, merged pieces, specials last) and the merges; vocab_size >= 259."""
    merges: list[tuple[str, str]] = []
    tokens = byte_alphabet()
    for pair in learn_merges(min(vocab_size - 256 - len(SPECIALS), 100)):
        merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    return [*tokens, *SPECIALS], merges


def tokenizer_json(vocab_size: int) -> dict[str, Any]:
    """The content of tokenizer.json; encoding adds <|begin_of_text|> in front."""
    tokens, merges = vocabulary(vocab_size)
    bos = len(tokens) - len(SPECIALS)
    bos_piece = {"SpecialToken": {"id": SPECIALS[0], "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": bos + i,
                "content": name,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, name in enumerate(SPECIALS)
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos_piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos_piece, {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {
                SPECIALS[0]: {"id": SPECIALS[0], "ids": [bos], "tokens": [SPECIALS[0]]}
            },
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {t: i for i, t in enumerate(tokens[:bos])},
            "merges": [list(p) for p in merges],
        },
    }


def tokenizer_config() -> dict[str, Any]:
    """The content of tokenizer_config.json."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[1],
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
