"""A checkpoint's tokenizer: text to ids and back, and chat templates."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.generate.chat_template import ChatTemplates, plain
from bitnet_ext.generate.pieces import Pieces, StreamDecoder, refusing
from bitnet_ext.gpu.interchange import is_array, to_host

if TYPE_CHECKING:
    from bitnet_ext.checkpoint import Checkpoint

__all__ = ["Tokenizer"]

# Around special tokens that stand in a user's message: Unicode noncharacters, so no text has them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"


class Tokenizer:
    """Text to token ids and back.

    Special tokens that stand in a text are read as plain text unless asked otherwise, so that
    a user's text cannot end a turn or forge one. One tokenizer serves several threads.

    Attributes:
        special_tokens: the named ones, as {"bos_token": "<s>", ...}.
    """

    def __init__(
        self,
        backend: Any,
        special_tokens: Mapping[str, str],
        chat_templates: ChatTemplates,
    ) -> None:
        self._backend = backend
        self._lock = threading.Lock()  # encode_special_tokens is a switch of the whole backend
        backend.no_padding()
        backend.no_truncation()
        if getattr(backend.model, "dropout", None) is not None:
            backend.model.dropout = None  # randomness of training
        self._pieces = Pieces(backend)
        self.special_tokens = dict(special_tokens)
        self._chat_templates = chat_templates
        added = backend.get_added_tokens_decoder()
        self._specials = {added[i].content: i for i in self._pieces.special_ids}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> Tokenizer:
        """The tokenizer in the files or metadata of a checkpoint.

        Raises:
            CheckpointError: none there, or damaged; UnsupportedModelError: of another kind.
        """
        from bitnet_ext.generate.tokenizer_files import read_directory, read_gguf

        files = checkpoint.tokenizer_files()
        if files:
            return cls(*read_directory(files, str(checkpoint.path)))
        return cls(*read_gguf(checkpoint.gguf_metadata, str(checkpoint.path)))

    @property
    def vocab_size(self) -> int:
        """Tokens, special ones included; the model's vocabulary may be padded beyond it."""
        return int(self._backend.get_vocab_size(with_added_tokens=True))

    def to_files(self) -> dict[str, str]:
        """tokenizer.json and tokenizer_config.json, as transformers' fast tokenizers have them."""
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **self.special_tokens,
        }
        if self._chat_templates.stored is not None:
            config["chat_template"] = self._chat_templates.stored
        return {
            "tokenizer.json": self._backend.to_str(),
            "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
        }

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, if the vocabulary names one."""
        return self._named("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """The id that ends a text, if the vocabulary names one."""
        return self._named("eos_token")

    @property
    def adds_bos(self) -> bool:
        """Whether :meth:`encode` puts the beginning-of-text token in front."""
        return self.bos_token_id is not None and self.encode("")[:1] == [self.bos_token_id]

    @property
    def chat_template(self) -> str | None:
        """The default chat template, None where the model has none."""
        return self._chat_templates.default

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens, which :meth:`decode` skips."""
        return self._pieces.special_ids

    def _named(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self.token_to_id(token)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it; None for an unknown one."""
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)

    def id_to_token(self, token_id: int) -> str | None:
        """The token of an id as the vocabulary spells it; None outside the vocabulary."""
        found = self._backend.id_to_token(token_id) if token_id >= 0 else None
        return None if found is None else str(found)

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = False
    ) -> list[int]:
        """The ids of a text.

        Args:
            text: any Unicode text.
            add_special_tokens: put in front (and behind) what the tokenizer is made to, as BOS.
            parse_special: read special tokens that stand in the text as such.

        Raises:
            InvalidShapeError: ``text`` is no string, or holds a lone surrogate.
            CheckpointError: the checkpoint's tokenizer fails at it.
        """
        if not isinstance(text, str):
            raise InvalidShapeError(f"text: found {type(text).__name__}, wanted a string")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidShapeError(
                f"text: found the lone surrogate {text[error.start]!a} at {error.start}, wanted "
                "Unicode text"
            ) from error
        with self._lock, refusing("tokenizer"):
            self._backend.encode_special_tokens = not parse_special
            return list(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of ids, a device's too; those outside the vocabulary have none, invalid UTF-8
        reads as U+FFFD.

        Raises:
            InvalidShapeError: something that is not an integer.
        """
        if is_array(ids):
            ids = to_host("ids", ids).tolist()
        decoder = self.stream_decoder(skip_special_tokens=skip_special_tokens)
        parts = [decoder.push(_integer(i)) for i in ids]
        return "".join(parts) + decoder.flush()

    def stream_decoder(
        self, after: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> StreamDecoder:
        """A decoder of tokens one by one that follow the ids ``after``.

        A text begins where nothing or a special token stands before: there, the space that
        sentencepiece puts in front is dropped.
        """
        at_start = len(after) == 0 or int(after[-1]) in self._pieces.special_ids
        return StreamDecoder(
            self._pieces, at_start=at_start, skip_special_tokens=skip_special_tokens
        )

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: Literal[True] = True,
        **options: Any,
    ) -> list[int]: ...
    @overload
    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: Literal[False], **options: Any
    ) -> str: ...
    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        parse_special: bool = False,
        **variables: Any,
    ) -> list[int] | str:
        """A conversation as the model was trained to see it, as ids (no second BOS) or text.

        Args:
            messages: [{"role": "user", "content": "..."}, ...].
            tokenize: return ids; else the text.
            add_generation_prompt: end with the head of the assistant's answer.
            chat_template: another template, or the name of one of the checkpoint's.
            tools, documents: JSON-like, for templates that use them.
            parse_special: read special tokens inside messages as such; else they are text.
            variables: passed to the template.

        Raises:
            CheckpointError: the model has no chat template, or a broken one.
            InvalidShapeError: messages of the wrong kind, or that the template refuses.
        """
        template = self._chat_templates.choose(chat_template, tools)
        given: dict[str, Any] = {"tools": tools, "documents": documents, **variables}
        chat: Any = messages
        guarded = not parse_special and bool(self._specials)
        if guarded and not isinstance(messages, str | bytes):
            special = re.compile("|".join(map(re.escape, _longest_first(self._specials))))
            chat, given = _marked(plain(messages), special), _marked(plain(given), special)
        given = self.special_tokens | given | {"add_generation_prompt": add_generation_prompt}
        text = self._chat_templates.render(template, chat, given)
        marked = guarded and (_OPEN in text or _CLOSE in text)
        if not tokenize:
            return text.replace(_OPEN, "").replace(_CLOSE, "") if marked else text
        if marked:
            return self._encode_marked(text)
        return self.encode(text, add_special_tokens=False, parse_special=True)

    def _encode_marked(self, text: str) -> list[int]:
        """Ids of a rendered chat in which the special tokens between markers are plain text."""
        special = "|".join(map(re.escape, _longest_first(self._specials)))
        ids: list[int] = []
        words = ""
        # Odd parts are special tokens, marked or not; a lone marker ends up in an even one.
        for part in re.split(f"({_OPEN}(?:{special}){_CLOSE}|{special})", text):
            if part in self._specials:
                ids += self.encode(words, add_special_tokens=False) if words else []
                ids.append(self._specials[part])
                words = ""
            else:
                words += part.replace(_OPEN, "").replace(_CLOSE, "")
        return ids + (self.encode(words, add_special_tokens=False) if words else [])


def _marked(value: Any, special: re.Pattern[str]) -> Any:
    """JSON-like ``value`` with every special token in its strings put between markers."""
    if isinstance(value, str):
        text = value.replace(_OPEN, "").replace(_CLOSE, "")
        return special.sub(f"{_OPEN}\\g<0>{_CLOSE}", text)
    if isinstance(value, dict):
        return {key: _marked(item, special) for key, item in value.items()}
    if isinstance(value, list):
        return [_marked(item, special) for item in value]
    return value


def _longest_first(tokens: Iterable[str]) -> list[str]:
    return sorted(tokens, key=lambda token: (-len(token), token))


def _integer(value: Any) -> int:
    if isinstance(value, int | np.integer) and not isinstance(value, bool):
        return int(value)
    raise InvalidShapeError(f"ids: found {value!r}, wanted integers")
