"""A checkpoint's tokenizer as GGUF metadata: its own, a byte-level BPE, or sentencepiece's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ext.checkpoint.files import load_json, map_file
from bitnet_ext.checkpoint.source import Checkpoint
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["tokenizer_metadata"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENIZER_BYTES = 64 << 20
SENTENCEPIECE_BPE = 2  # of unigram, word and char models
ELSE = "; write the file without its tokenizer, or add the tokenizer with llama.cpp's converter"

# What cuts text before merging -> tokenizer.ggml.pre.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = (
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
PRE_NAMES = {
    (LLAMA3,): "llama-bpe",
    (LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"),): "qwen2",
    (GPT2,): "gpt-2",
    (r"\p{N}", GPT2): "smollm",
}


def tokenizer_metadata(config: BitNetConfig, checkpoint: Checkpoint) -> dict[str, Any]:
    """The tokenizer.* keys; empty where the checkpoint has no tokenizer.

    Raises:
        UnsupportedModelError: a tokenizer of a kind that GGUF has no name for here.
        CheckpointError: a tokenizer file that contradicts itself or the model.
    """
    if checkpoint.gguf_metadata:
        return {k: v for k, v in checkpoint.gguf_metadata.items() if k.startswith("tokenizer.")}
    files = checkpoint.tokenizer_files()
    if "tokenizer.json" in files:
        raw = load_json(files["tokenizer.json"], max_bytes=MAX_TOKENIZER_BYTES)
        keys = _byte_level(raw, files["tokenizer.json"], config)
    elif "tokenizer.model" in files:
        keys = _sentencepiece(files, config)
    else:
        return {}
    return keys | _chat_templates(files)


def _byte_level(raw: dict[str, Any], path: Path, config: BitNetConfig) -> dict[str, Any]:
    model = raw.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE" or model.get("byte_fallback"):
        raise UnsupportedModelError(f"{path}: is not a byte-level BPE" + ELSE)
    vocabulary, merges = model.get("vocab"), model.get("merges")
    if not isinstance(vocabulary, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{path}: model: wanted an object vocab and a list merges")
    added = raw.get("added_tokens") or []
    if not isinstance(added, list) or not all(isinstance(a, dict) for a in added):
        raise CheckpointError(f"{path}: added_tokens: wanted a list of objects")
    tokens: list[str | None] = [None] * config.vocab_size
    types = np.full(config.vocab_size, UNUSED, "<i4")
    kinds = [(token, number, NORMAL) for token, number in vocabulary.items()] + [
        (a.get("content"), a.get("id"), CONTROL if a.get("special") else USER_DEFINED)
        for a in added
    ]
    for token, number, kind in kinds:
        if type(number) is not int or not 0 <= number < len(tokens) or not isinstance(token, str):
            raise CheckpointError(
                f"{path}: found the token {str(token)[:80]!r} with id {str(number)[:40]}, wanted "
                f"ids of 0 to {len(tokens) - 1}, the rows of the embedding"
            )
        tokens[number], types[number] = token, kind
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre(raw.get("pre_tokenizer"), path),
        "tokenizer.ggml.tokens": [
            f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens)
        ],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [_merge(rule, path) for rule in merges],
        **_bos(raw.get("post_processor"), tokens),
    }


def _merge(rule: Any, path: Path) -> str:
    """ "left right", as older files have it and GGUF wants it."""
    if isinstance(rule, list) and len(rule) == 2 and all(isinstance(side, str) for side in rule):
        rule = " ".join(rule)
    if not isinstance(rule, str) or rule.count(" ") != 1:
        raise CheckpointError(f"{path}: merges: found {str(rule)[:80]!r}, wanted two tokens")
    return rule


def _pre(found: Any, path: Path) -> str:
    """The name of what cuts text before merging."""
    steps = found.get("pretokenizers") if _is(found, "Sequence") else [found]
    patterns: list[str] = []
    for step in steps if isinstance(steps, list) else []:
        if _is(step, "Split") and isinstance(step.get("pattern"), dict):
            patterns.append(str(step["pattern"].get("Regex")))
        elif _is(step, "Digits") and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        elif _is(step, "ByteLevel") and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        else:
            patterns.append(f"{step}")
    name = PRE_NAMES.get(tuple(patterns))
    if name is None:
        raise UnsupportedModelError(
            f"{path}: pre_tokenizer: GGUF has no name for {str(found)[:120]}" + ELSE
        )
    return name


def _is(step: Any, kind: str) -> bool:
    return isinstance(step, dict) and step.get("type") == kind


def _bos(post: Any, tokens: list[str | None]) -> dict[str, Any]:
    """The special token that stands in front of a single text, if one does."""
    steps = post.get("processors") if _is(post, "Sequence") else [post]
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if _is(step, "TemplateProcessing") else None
        first = single[0] if isinstance(single, list) and single else None
        special = first.get("SpecialToken") if isinstance(first, dict) else None
        if isinstance(special, dict) and special.get("id") in tokens:
            return {
                "tokenizer.ggml.add_bos_token": True,
                "tokenizer.ggml.bos_token_id": tokens.index(special["id"]),
            }
    return {"tokenizer.ggml.add_bos_token": False}


def _sentencepiece(files: dict[str, Path], config: BitNetConfig) -> dict[str, Any]:
    """A sentencepiece BPE's pieces with their scores; a space stands in front of a text."""
    path = files["tokenizer.model"]
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UnsupportedModelError(
            f"{path}: embedding this tokenizer needs the sentencepiece and protobuf packages: "
            "pip install 'bitnet-ext[sentencepiece]'"
        ) from error
    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    try:
        model.ParseFromString(map_file(path).tobytes())
    except Exception as error:  # protobuf's DecodeError, without importing protobuf
        raise CheckpointError(f"{path}: is no sentencepiece model: {error}") from error
    normal, pieces = model.normalizer_spec, model.pieces
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE or normal.precompiled_charsmap:
        raise UnsupportedModelError(
            f"{path}: found a model that is not BPE or normalises text, wanted BPE as Llama's"
            + ELSE
        )
    if len(pieces) > config.vocab_size:
        raise CheckpointError(
            f"{path}: found {len(pieces)} pieces, wanted at most {config.vocab_size}, the rows of "
            "the embedding"
        )
    tokens = [p.piece for p in pieces] + [
        f"[PAD{i}]" for i in range(len(pieces), config.vocab_size)
    ]
    types = np.full(config.vocab_size, UNUSED, "<i4")
    scores = np.zeros(config.vocab_size, "<f4")
    types[: len(pieces)] = [p.type for p in pieces]
    scores[: len(pieces)] = [p.score for p in pieces]
    settings = _json(files, "tokenizer_config.json")
    for content, number in _added(files, settings):
        if not 0 <= number < config.vocab_size:
            raise CheckpointError(f"{path}: the added token {content[:80]!r} has id {number}")
        tokens[number], types[number] = content, CONTROL
    begins, bos = settings.get("add_bos_token"), model.trainer_spec.bos_id
    named = {"tokenizer.ggml.bos_token_id": bos} if 0 <= bos < len(pieces) else {}
    return named | {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": scores,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.add_space_prefix": bool(normal.add_dummy_prefix),
        "tokenizer.ggml.add_bos_token": begins if isinstance(begins, bool) else True,
    }


def _json(files: dict[str, Path], name: str) -> dict[str, Any]:
    return load_json(files[name]) if name in files else {}


def _added(files: dict[str, Path], settings: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Tokens that Hugging Face files add: {content: id} and {id: {"content": ...}}."""
    for content, number in _json(files, "added_tokens.json").items():
        if type(number) is int:
            yield content, number
    decoder = settings.get("added_tokens_decoder")
    for key, entry in (decoder if isinstance(decoder, dict) else {}).items():
        if key.isdecimal() and isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield entry["content"], int(key)


def _chat_templates(files: dict[str, Path]) -> dict[str, Any]:
    """tokenizer.chat_template, and the named ones beside it."""
    if "chat_template.jinja" in files:
        return {"tokenizer.chat_template": files["chat_template.jinja"].read_text("utf-8")}
    found = _json(files, "tokenizer_config.json").get("chat_template")
    if isinstance(found, str):
        return {"tokenizer.chat_template": found}
    keys: dict[str, Any] = {}
    named = found if isinstance(found, list) else []
    for entry in named:
        if not isinstance(entry, dict):
            continue
        name, template = entry.get("name"), entry.get("template")
        if isinstance(name, str) and isinstance(template, str):
            key = "tokenizer.chat_template"
            keys[key if name == "default" else f"{key}.{name}"] = template
    others = [k.removeprefix("tokenizer.chat_template.") for k in keys if k.count(".") > 1]
    return keys | ({"tokenizer.chat_templates": others} if others else {})
