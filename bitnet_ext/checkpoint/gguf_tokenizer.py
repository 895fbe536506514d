"""A checkpoint's tokenizer as GGUF metadata: its own, or a byte-level tokenizer.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ext.checkpoint.files import load_json
from bitnet_ext.checkpoint.source import Checkpoint
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["tokenizer_metadata"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
MAX_TOKENIZER_BYTES = 64 << 20
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
    path = files.get("tokenizer.json")
    if path is None:
        if "tokenizer.model" in files:
            raise UnsupportedModelError(
                f"{files['tokenizer.model']}: a sentencepiece vocabulary is not embedded" + ELSE
            )
        return {}
    raw = load_json(path, max_bytes=MAX_TOKENIZER_BYTES)
    return _byte_level(raw, path, config) | _chat_templates(files)


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
        "tokenizer.ggml.add_bos_token": _adds_bos(raw.get("post_processor")),
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


def _adds_bos(post: Any) -> bool:
    """Whether a single text gets a special token in front."""
    steps = post.get("processors") if _is(post, "Sequence") else [post]
    for step in steps if isinstance(steps, list) else []:
        single = step.get("single") if _is(step, "TemplateProcessing") else None
        if isinstance(single, list) and single and isinstance(single[0], dict):
            return "SpecialToken" in single[0]
    return False


def _chat_templates(files: dict[str, Path]) -> dict[str, Any]:
    """tokenizer.chat_template, and the named ones beside it."""
    if "chat_template.jinja" in files:
        return {"tokenizer.chat_template": files["chat_template.jinja"].read_text("utf-8")}
    if "tokenizer_config.json" not in files:
        return {}
    found = load_json(files["tokenizer_config.json"]).get("chat_template")
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
