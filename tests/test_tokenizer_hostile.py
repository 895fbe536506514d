"""Tokenizers that contradict themselves or are of another kind: typed errors, bounded work."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_tokenizers import DATA, from_files, from_gguf, gguf_keys, spm_keys
from tiny_tokenizer import tokenizer_json

from bitnet_ext.errors import CheckpointError, UnsupportedModelError
from bitnet_ext.generate import tokenizer_files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, "no tokenizer"),
        ({"model": "bert"}, "'bert'"),
        ({"pre": "no-such"}, "'no-such'"),
        ({"tokens": None}, "tokens: found NoneType"),
        ({"tokens": []}, "found 0 tokens"),
        ({"tokens": [1, 2]}, "list of strings"),
        ({"tokens": ["a", "b", "a"], "token_type": None}, "'a' stands twice, at 0 and 2"),
        ({"token_type": np.ones(3, np.int32)}, "found 3 token types"),
        ({"token_type": np.ones(320, np.float32)}, "token_type: found float32"),
        ({"token_type": "x"}, "token_type: found str"),
        ({"merges": None}, "merges"),
        ({"merges": ["nosuch pair"]}, "merge 0 is 'nosuch pair'"),
        ({"merges": ["a"]}, "merge 0"),
        ({"merges": [""]}, "merge 0"),
        ({"bos_token_id": 320}, "bos_token_id: found 320"),
        ({"eos_token_id": -1}, "eos_token_id: found -1"),
        ({"eos_token_id": 1.5}, "eos_token_id: found 1.5"),
    ],
)
def test_hostile_gguf_byte_level(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_gguf(gguf_keys(**changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": None}, "without scores"),
        ({"scores": np.zeros(5, np.float32)}, "5 scores"),
        ({"scores": np.full(360, np.nan, np.float32)}, "not finite|scores"),
        ({"tokens": ["a" * 20_000, "b"], "token_type": None}, "scores"),
        (
            {"tokens": ["a"], "scores": np.zeros(1, np.float32), "token_type": None},
            "no unknown token and no byte tokens",
        ),
    ],
)
def test_hostile_gguf_sentencepiece(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        from_gguf(spm_keys(**changes))


def test_hostile_pieces_cannot_make_merging_endless() -> None:
    tokens = ["<unk>", *("a" * n for n in range(1, 1000))]
    keys = spm_keys(
        tokens=tokens,
        scores=np.zeros(1000, np.float32),
        token_type=np.array([2, *[1] * 999], np.int32),
    )
    with pytest.raises(CheckpointError, match="too long to be pieces"):
        from_gguf(keys)


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"{}",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(tokenizer_json(320) | {"model": {"type": "BPE", "vocab": {"a": -1}}}).encode(),
        json.dumps(tokenizer_json(320) | {"decoder": {"type": "CTC"}}).encode(),
        json.dumps(
            tokenizer_json(320)
            | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}}
        ).encode(),
    ],
)
def test_hostile_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        from_files(tmp_path, tokenizer__json=content)


def test_tokenizer_that_fails_at_its_work(tmp_path: Path) -> None:
    content = tokenizer_json(320)
    content["model"] = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "missing"}
    content["added_tokens"], content["post_processor"] = [], None
    tokenizer = from_files(tmp_path, tokenizer__json=content)
    with pytest.raises(CheckpointError, match="tokenizer: is no valid tokenizer"):
        tokenizer.encode("hello")


@pytest.mark.parametrize(
    "config",
    [{"bos_token": 5}, {"bos_token": ["a"]}, {"chat_template": 5}, {"chat_template": [{"a": 1}]}],
)
def test_hostile_tokenizer_config(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        from_files(tmp_path, tokenizer__json=tokenizer_json(320), tokenizer_config__json=config)


@pytest.mark.parametrize("content", [b"junk" * 50, b"\x0a\xff\xff\xff\xff\x0f"])
def test_hostile_sentencepiece_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(CheckpointError):
        from_files(tmp_path, tokenizer__model=content)


@pytest.mark.parametrize("entry", [{"0": {}}, {"x": {"content": "a"}}, {"0": 5}, [1]])
def test_hostile_added_tokens(tmp_path: Path, entry: Any) -> None:
    raw = (DATA / "spm_plain.model").read_bytes()
    config = {"added_tokens_decoder": entry}
    with pytest.raises(CheckpointError):
        from_files(tmp_path, tokenizer__model=raw, tokenizer_config__json=config)


def test_chat_template_that_is_not_text(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        from_files(tmp_path, tokenizer__json=tokenizer_json(320), chat_template__jinja=b"\xff\xfe")


def test_files_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_files, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="wanted at most 1000"):
        from_files(tmp_path, tokenizer__json=tokenizer_json(320))


def test_files_of_another_kind(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"found vocab\.json, wanted tokenizer\.json"):
        from_files(tmp_path, vocab__json={})
