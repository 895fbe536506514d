"""Tokenizers as checkpoints hold them: tokenizer.json, tokenizer.model, or keys of a GGUF file.

Each reader gives (backend, named special tokens, chat templates), what a Tokenizer is made of.
Everything here is untrusted: what contradicts itself raises CheckpointError.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from bitnet_ext.checkpoint.files import load_json, map_file
from bitnet_ext.checkpoint.gguf_constants import NO_TOKENIZER
from bitnet_ext.errors import CheckpointError, UnsupportedModelError
from bitnet_ext.generate.chat_template import ChatTemplates
from bitnet_ext.generate.pieces import refusing
from bitnet_ext.generate.vocabulary import (
    LLAMA3_NAMES,
    Vocabulary,
    byte_level_backend,
    gguf_vocabulary,
    sentencepiece_backend,
    strings,
)

__all__ = ["read_directory", "read_gguf"]

Parts = tuple[Any, dict[str, str], ChatTemplates]
MAX_FILE_BYTES = 64 << 20
SPECIAL_NAMES = tuple(
    f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
SENTENCEPIECE_BPE = 2  # of unigram, word and char models


def read_directory(files: dict[str, Path], where: str) -> Parts:
    """The tokenizer of a Hugging Face directory: tokenizer.json, else tokenizer.model.

    Raises:
        UnsupportedModelError: files of another kind, or the sentencepiece extra is missing.
        CheckpointError: damaged files.
    """
    config = _json(files, "tokenizer_config.json")
    specials = _special_tokens([config, _json(files, "special_tokens_map.json")], where)
    if "tokenizer.json" in files:
        backend = _from_json(files["tokenizer.json"])
    elif "tokenizer.model" in files:
        backend, own = _from_sentencepiece(files, config)
        specials = own | specials
    else:
        raise UnsupportedModelError(
            f"{where}: found {', '.join(sorted(files))}, wanted tokenizer.json or tokenizer.model; "
            "save it with transformers' fast tokenizer, or pass token ids"
        )
    return backend, specials, _chat_templates(files, config, where)


def _json(files: dict[str, Path], name: str) -> dict[str, Any]:
    return load_json(files[name]) if name in files else {}


def _special_tokens(sources: list[dict[str, Any]], where: str) -> dict[str, str]:
    """The named special tokens; the first source that has one wins."""
    found: dict[str, str] = {}
    for source in sources:
        for name in SPECIAL_NAMES:
            token = source.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is None:
                continue
            if not isinstance(token, str):
                raise CheckpointError(
                    f"{where}: {name}: found {type(token).__name__}, wanted a token"
                )
            found.setdefault(name, token)
    return found


def _chat_templates(files: dict[str, Path], config: dict[str, Any], where: str) -> ChatTemplates:
    """chat_template.jinja, else the key of chat_template.json or tokenizer_config.json."""
    if "chat_template.jinja" in files:
        raw = _bytes(files["chat_template.jinja"])
        try:
            return ChatTemplates(raw.decode(), where)
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{where}: chat_template.jinja is not UTF-8") from error
    beside = _json(files, "chat_template.json").get("chat_template")
    return ChatTemplates(beside or config.get("chat_template"), where)


def _bytes(path: Path) -> bytes:
    raw = map_file(path)
    if len(raw) > MAX_FILE_BYTES:
        raise CheckpointError(f"{path}: found {len(raw)} bytes, wanted at most {MAX_FILE_BYTES}")
    return raw.tobytes()


def _from_json(path: Path) -> Any:
    from tokenizers import Tokenizer as Backend

    raw = _bytes(path)
    with refusing(path):
        return Backend.from_str(raw.decode())


def _from_sentencepiece(
    files: dict[str, Path], config: dict[str, Any]
) -> tuple[Any, dict[str, str]]:
    """A sentencepiece model file, read through its protobuf description."""
    path = files["tokenizer.model"]
    try:
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UnsupportedModelError(
            f"{path}: reading this tokenizer needs the sentencepiece and protobuf packages: "
            "pip install 'bitnet-ext[sentencepiece]'"
        ) from error
    description: Any = sentencepiece_model_pb2
    model = description.ModelProto()
    with refusing(path):
        model.ParseFromString(_bytes(path))
    kind = model.trainer_spec.model_type
    if kind != SENTENCEPIECE_BPE:
        raise UnsupportedModelError(
            f"{path}: found sentencepiece model type {kind}, wanted BPE ({SENTENCEPIECE_BPE}); "
            "pass token ids instead of text"
        )
    vocabulary = Vocabulary(
        [piece.piece for piece in model.pieces],
        [piece.type for piece in model.pieces],
        [piece.score for piece in model.pieces],
        str(path),
    )
    normal = model.normalizer_spec
    with refusing(path):
        backend = sentencepiece_backend(
            vocabulary,
            space_prefix=normal.add_dummy_prefix,
            collapse_spaces=normal.remove_extra_whitespaces,
            charsmap=normal.precompiled_charsmap,
        )
        _append_tokens(backend, files, config, path)
    named = {"bos_token": model.trainer_spec.bos_id, "eos_token": model.trainer_spec.eos_id}
    named |= {"unk_token": model.trainer_spec.unk_id}
    own = {k: vocabulary.tokens[i] for k, i in named.items() if 0 <= i < len(vocabulary.tokens)}
    _surround(backend, own | _special_tokens([config], str(path)), config.get, bos=True)
    return backend, own


def _append_tokens(
    backend: Any, files: dict[str, Path], config: dict[str, Any], path: Path
) -> None:
    """Tokens that Hugging Face files add behind the vocabulary: {content: id} or {id: {...}}."""
    from tokenizers import AddedToken

    found: dict[str, Any] = dict(_json(files, "added_tokens.json"))
    for key, entry in (config.get("added_tokens_decoder") or {}).items():
        found[entry["content"]] = int(key)
    for content, wanted in sorted(found.items(), key=lambda item: int(item[1])):
        backend.add_tokens([AddedToken(content, normalized=False, special=True)])
        if backend.token_to_id(content) != wanted:
            raise CheckpointError(
                f"{path}: the added token {content[:80]!r} has id {wanted}, wanted "
                f"{backend.token_to_id(content)}"
            )


def _surround(
    backend: Any, specials: dict[str, str], flag: Callable[[str], Any], *, bos: bool
) -> None:
    """Put BOS in front and EOS behind as the flags add_bos_token and add_eos_token say."""
    from tokenizers import processors

    front, behind = flag("add_bos_token"), flag("add_eos_token")
    begin = specials.get("bos_token") if (bos if front is None else front) else None
    end = specials.get("eos_token") if behind else None
    tokens = [token for token in (begin, end) if token is not None]
    if tokens:
        parts = [begin, "$A", end]
        backend.post_processor = processors.TemplateProcessing(
            single=[part for part in parts if part is not None],
            special_tokens=[(token, backend.token_to_id(token)) for token in dict.fromkeys(tokens)],
        )


def read_gguf(metadata: dict[str, Any], where: str) -> Parts:
    """The tokenizer embedded in a GGUF file: "gpt2" (byte-level BPE) or "llama" (sentencepiece).

    A byte-level vocabulary without tokenizer.ggml.pre is Llama 3's, as in Microsoft's files.

    Raises:
        UnsupportedModelError: another kind; CheckpointError: absent or damaged.
    """
    kind = _of_type(metadata, "tokenizer.ggml.model", str, where)
    if kind in (None, NO_TOKENIZER):
        raise CheckpointError(f"{where}: the model has no tokenizer; pass token ids")
    if kind not in ("gpt2", "llama"):
        raise UnsupportedModelError(
            f"{where}: tokenizer.ggml.model: found {kind!r:.80}, wanted 'gpt2' or 'llama'; pass "
            "token ids instead of text"
        )
    vocabulary = gguf_vocabulary(metadata, where)
    pre = _of_type(metadata, "tokenizer.ggml.pre", str, where) or "llama-bpe"
    with refusing(where):
        if kind == "gpt2":
            merges = strings(metadata, "tokenizer.ggml.merges", where)
            backend = byte_level_backend(vocabulary, merges, pre)
        else:
            prefix = _of_type(metadata, "tokenizer.ggml.add_space_prefix", bool, where)
            backend = sentencepiece_backend(vocabulary, space_prefix=prefix is not False)
    specials = _gguf_specials(metadata, vocabulary)

    def flag(name: str) -> Any:
        return _of_type(metadata, f"tokenizer.ggml.{name}", bool, where)

    with refusing(where):
        _surround(backend, specials, flag, bos=kind == "llama" or pre in LLAMA3_NAMES)
    return backend, specials, ChatTemplates(_gguf_templates(metadata), where)


def _of_type(metadata: dict[str, Any], key: str, kind: type, where: str) -> Any:
    """A value of the metadata, None where it is absent; CheckpointError for another type."""
    value = metadata.get(key)
    if value is None or isinstance(value, kind):
        return value
    raise CheckpointError(f"{where}: {key}: found {str(value)[:80]!r}, wanted a {kind.__name__}")


def _gguf_specials(metadata: dict[str, Any], vocabulary: Vocabulary) -> dict[str, str]:
    keys = {"bos": "bos", "eos": "eos", "unknown": "unk", "seperator": "sep", "padding": "pad"}
    found = {}
    for key, short in keys.items():
        number = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if number is None:
            continue
        if type(number) is not int or not 0 <= number < len(vocabulary.tokens):
            raise CheckpointError(
                f"{vocabulary.where}: tokenizer.ggml.{key}_token_id: found {number!r}, wanted 0 to "
                f"{len(vocabulary.tokens) - 1}"
            )
        found[f"{short}_token"] = vocabulary.tokens[number]
    return found


def _gguf_templates(metadata: dict[str, Any]) -> Any:
    """tokenizer.chat_template, and the named ones under tokenizer.chat_template.<name>."""
    prefix = "tokenizer.chat_template"
    if not any(key.startswith(f"{prefix}.") for key in metadata):
        return metadata.get(prefix)
    named = {"default": metadata[prefix]} if prefix in metadata else {}
    named |= {k[len(prefix) + 1 :]: v for k, v in metadata.items() if k.startswith(f"{prefix}.")}
    return [{"name": name, "template": template} for name, template in named.items()]
