"""Tokenizers for tests: keys of a GGUF file with changes, and files of a directory."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizer import SPECIALS, vocabulary

from bitnet_ext.generate.tokenizer import Tokenizer
from bitnet_ext.generate.tokenizer_files import read_directory, read_gguf

DATA = Path(__file__).parent / "data"
BOS, EOS, EOT = 317, 318, 319


def gguf_keys(**changes: Any) -> dict[str, Any]:
    tokens, merges = vocabulary(320)
    keys: dict[str, Any] = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([3 if t in SPECIALS else 1 for t in tokens], np.int32),
        "merges": [" ".join(m) for m in merges],
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "add_bos_token": True,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def spm_keys(kind: str = "plain", **changes: Any) -> dict[str, Any]:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((DATA / f"spm_{kind}.model").read_bytes())
    keys: dict[str, Any] = {
        "model": "llama",
        "tokens": [p.piece for p in model.pieces],
        "scores": np.array([p.score for p in model.pieces], np.float32),
        "token_type": np.array([p.type for p in model.pieces], np.int32),
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    return {f"tokenizer.ggml.{k}": v for k, v in keys.items() if v is not None}


def from_gguf(keys: dict[str, Any]) -> Tokenizer:
    return Tokenizer(*read_gguf(keys, "test.gguf"))


def from_files(tmp_path: Path, **files: Any) -> Tokenizer:
    found = {}
    for name, content in files.items():
        path = tmp_path / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        found[path.name] = path
    return Tokenizer(*read_directory(found, str(tmp_path)))
