"""Vocabularies inside GGUF and sentencepiece files, built into tokenizers of the usual kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "LLAMA3_NAMES",
    "Vocabulary",
    "byte_level_backend",
    "gguf_vocabulary",
    "sentencepiece_backend",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENS = 2_000_000
MAX_SPLITS = 50_000_000  # characters looked at to list a vocabulary's merges

# How text is cut before merging; the names are those of tokenizer.ggml.pre.
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = (
    _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_NAMES = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(LLAMA3_NAMES, (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen"), (_QWEN2,)),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "smollm", "codeshell"), (r"\p{N}", _GPT2)),
}


@dataclass
class Vocabulary:
    """The tokens of a file by id, with sentencepiece's kinds (NORMAL ... BYTE) and scores."""

    tokens: list[str]
    types: Sequence[int]
    scores: Sequence[float] | None
    where: str

    def __post_init__(self) -> None:
        count = len(self.tokens)
        if not 0 < count <= MAX_TOKENS:
            raise CheckpointError(f"{self.where}: found {count} tokens, wanted 1 to {MAX_TOKENS}")
        if len(self.types) != count or (self.scores is not None and len(self.scores) != count):
            raise CheckpointError(
                f"{self.where}: found {len(self.types)} token types and "
                f"{len(self.scores or ())} scores, wanted {count} of each"
            )
        if self.scores is not None and not np.isfinite(np.asarray(self.scores)).all():
            raise CheckpointError(f"{self.where}: found a score that is not finite")
        self.tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(self.tokens)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        if len(self.ids) != count:
            twice = next(i for i, t in enumerate(self.tokens) if self.ids[t] != i)
            raise CheckpointError(
                f"{self.where}: the token {self.tokens[twice][:80]!r} stands twice, at {twice} "
                f"and {self.ids[self.tokens[twice]]}"
            )


def gguf_vocabulary(metadata: dict[str, Any], where: str) -> Vocabulary:
    """tokenizer.ggml.tokens, token_type and scores.

    Raises:
        CheckpointError: absent, of the wrong kind, or contradictory.
    """
    tokens = strings(metadata, "tokenizer.ggml.tokens", where)
    types = _numbers(metadata, "tokenizer.ggml.token_type", where)
    scores = _numbers(metadata, "tokenizer.ggml.scores", where)
    if types is not None and types.dtype.kind not in "iu":
        raise CheckpointError(f"{where}: tokenizer.ggml.token_type: found {types.dtype}")
    kinds = [NORMAL] * len(tokens) if types is None else types.tolist()
    return Vocabulary(tokens, kinds, None if scores is None else scores.tolist(), where)


def strings(metadata: dict[str, Any], key: str, where: str) -> list[str]:
    """A list of strings of the metadata, or CheckpointError."""
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(s, str) for s in found):
        raise CheckpointError(
            f"{where}: {key}: found {type(found).__name__}, wanted a list of strings"
        )
    return found


def _numbers(metadata: dict[str, Any], key: str, where: str) -> np.ndarray[Any, Any] | None:
    found = metadata.get(key)
    if found is None or (isinstance(found, np.ndarray) and found.dtype.kind in "iuf"):
        return found
    raise CheckpointError(f"{where}: {key}: found {type(found).__name__}, wanted an array")


def byte_level_backend(vocabulary: Vocabulary, merges: list[str], pre: str) -> Any:
    """A tokenizers.Tokenizer of GPT-2's kind: bytes spelt as characters, merged by rank.

    Raises:
        UnsupportedModelError: an unknown ``pre``; CheckpointError: merges of unknown tokens.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    patterns = PRE_TOKENIZERS.get(pre)
    if patterns is None:
        raise UnsupportedModelError(
            f"{vocabulary.where}: tokenizer.ggml.pre: found {pre[:80]!r}, wanted one of "
            + ", ".join(PRE_TOKENIZERS)
            + "; pass token ids instead of text"
        )
    pairs = [_merge(vocabulary, rule, rank) for rank, rule in enumerate(merges)]
    # Llama 3 takes a word that is a token whole, without merging.
    model = models.BPE(vocabulary.ids, pairs, ignore_merges=pre in LLAMA3_NAMES)
    backend = Tokenizer(model)
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, spelling])
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, vocabulary)
    return backend


def _merge(vocabulary: Vocabulary, rule: str, rank: int) -> tuple[str, str]:
    """The two sides of a merge; a side may begin with the space that it is cut at."""
    left, _, right = rule[1:].partition(" ")
    left = rule[:1] + left
    for token in (left, right, left + right):
        if token not in vocabulary.ids:
            raise CheckpointError(
                f"{vocabulary.where}: tokenizer.ggml.merges: merge {rank} is {rule[:80]!r}, and "
                f"{token[:80]!r} is no token"
            )
    return left, right


def sentencepiece_backend(
    vocabulary: Vocabulary,
    *,
    space_prefix: bool = True,
    collapse_spaces: bool = False,
    charsmap: bytes = b"",
) -> Any:
    """A tokenizers.Tokenizer of sentencepiece's BPE: pieces merged by score, bytes for the unknown.

    The normaliser's options: ``space_prefix`` (a space in front of a text, and after every
    special token), ``collapse_spaces``, ``charsmap`` (sentencepiece's compiled replacements).

    Raises:
        CheckpointError: no scores, or no unknown token.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers

    scores = vocabulary.scores
    if scores is None:
        raise CheckpointError(f"{vocabulary.where}: a sentencepiece vocabulary without scores")
    unknown = next((i for i, kind in enumerate(vocabulary.types) if kind == UNKNOWN), None)
    has_bytes = BYTE in vocabulary.types
    if unknown is None and not has_bytes:
        raise CheckpointError(f"{vocabulary.where}: found no unknown token and no byte tokens")
    model = models.BPE(
        vocabulary.ids,
        _score_merges(vocabulary, scores),
        unk_token=None if unknown is None else vocabulary.tokens[unknown],
        fuse_unk=True,
        byte_fallback=has_bytes,
    )
    backend = Tokenizer(model)
    steps: list[normalizers.Normalizer] = []
    if charsmap:
        steps += [normalizers.Precompiled(charsmap)]
    if collapse_spaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), "")]
        steps += [normalizers.Replace(Regex(" {2,}"), " ")]
    if space_prefix:
        steps += [normalizers.Prepend("\u2581")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if space_prefix else [])
    )
    _add_tokens(backend, vocabulary)
    return backend


def _score_merges(vocabulary: Vocabulary, scores: Sequence[float]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two, best score first.

    Merging the pair of best score first, sentencepiece's rule, is merging by this rank.
    """
    usable = {
        token: scores[i]
        for i, token in enumerate(vocabulary.tokens)
        if vocabulary.types[i] in (NORMAL, UNUSED)
    }
    work = sum(len(token) ** 2 for token in usable)
    if work > MAX_SPLITS:
        raise CheckpointError(f"{vocabulary.where}: its tokens are too long to be pieces")
    found = []
    for token, score in usable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in usable and right in usable:
                found.append((-score, vocabulary.ids[left], vocabulary.ids[right]))
    found.sort()
    return [(vocabulary.tokens[left], vocabulary.tokens[right]) for _, left, right in found]


def _add_tokens(backend: Any, vocabulary: Vocabulary) -> None:
    """Make control tokens special, and user-defined ones whole words of the text."""
    from tokenizers import AddedToken

    for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
        backend.add_tokens(
            [
                AddedToken(token, normalized=False, special=special)
                for token, found in zip(vocabulary.tokens, vocabulary.types, strict=True)
                if found == kind
            ]
        )
