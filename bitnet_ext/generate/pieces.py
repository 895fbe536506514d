"""From token ids to text, whole or as the tokens come.

A token is a string of bytes; text is the UTF-8 reading of the bytes in a row. Both faces of
decoding read them with one incremental decoder, so that joined pieces of a stream equal the whole.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["Pieces", "StreamDecoder", "refusing"]


@contextmanager
def refusing(where: object) -> Iterator[None]:
    """Turn what the tokenizers library raises into CheckpointError.

    It raises plain Exception, and PanicException (a BaseException) where its Rust code panics.
    """
    try:
        yield
    except (CheckpointError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise CheckpointError(f"{where}: is no valid tokenizer: {error}") from error


def byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, to the byte.

    Printable Latin-1 stands for itself; the other 68 bytes take the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    alphabet = {chr(byte): byte for byte in plain}
    return alphabet | {chr(0x100 + i): byte for i, byte in enumerate(rest)}


ALPHABET = byte_alphabet()
_KNOWN_STEPS = ("Replace", "ByteFallback", "Fuse", "Strip", "ByteLevel", "Metaspace")


class Pieces:
    """The bytes of each token, as the tokenizer's decoder defines them.

    Byte-level vocabularies spell bytes with ALPHABET; sentencepiece ones write a space as U+2581,
    single bytes as <0xNN>, and put a space in front of a text, which decoding takes away
    (``strips_space``).

    Raises:
        UnsupportedModelError: a decoder of another kind.
    """

    def __init__(self, backend: Any) -> None:
        self._backend = backend
        state = backend.decoder.__getstate__() if backend.decoder is not None else b"{}"
        step: dict[str, Any] = json.loads(state)
        steps = step["decoders"] if step.get("type") == "Sequence" else [step]
        kinds = [s.get("type") for s in steps]
        odd = [kind for kind in kinds if kind not in _KNOWN_STEPS]
        if odd:
            raise UnsupportedModelError(
                f"tokenizer: found a decoder of type {odd[0]!r}, wanted byte-level or "
                "sentencepiece; pass token ids instead of text"
            )
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self.strips_space = "Strip" in kinds or any(
            s.get("type") == "Metaspace" and s.get("prepend_scheme") != "never" for s in steps
        )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self._cache: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        """The token's bytes; none for an id outside the vocabulary (tables may be padded)."""
        found = self._cache.get(token_id)
        if found is None:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            found = self._cache[token_id] = b"" if token is None else self._spell(token)
        return found

    def _spell(self, token: str) -> bytes:
        if self._byte_level:
            if all(char in ALPHABET for char in token):
                return bytes(ALPHABET[char] for char in token)
            return token.encode()  # an added token
        if self._byte_fallback and len(token) == 6 and token.startswith("<0x") and token[5] == ">":
            try:
                return bytes([int(token[3:5], 16)])
            except ValueError:
                return token.encode()
        return token.replace("\u2581", " ").encode()


class StreamDecoder:
    """Text of tokens as they come; a character whose bytes are not all there is held back.

    Invalid bytes read as U+FFFD, as ``bytes.decode("utf-8", "replace")`` reads them.

    Args:
        pieces: the tokenizer's.
        at_start: whether a text begins here, so that sentencepiece's own space is dropped.
        skip_special_tokens: whether special tokens leave no text.
    """

    def __init__(
        self, pieces: Pieces, *, at_start: bool = True, skip_special_tokens: bool = True
    ) -> None:
        self._pieces = pieces
        self._drop_space = at_start and pieces.strips_space
        self._skipped = pieces.special_ids if skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that this token completes, perhaps none."""
        if token_id in self._skipped:
            return ""
        return self._trim(self._utf8.decode(self._pieces.bytes_of(token_id)))

    def flush(self) -> str:
        """What was held back, when no more tokens come."""
        return self._trim(self._utf8.decode(b"", final=True))

    def _trim(self, text: str) -> str:
        if self._drop_space and text:
            self._drop_space = False
            return text.removeprefix(" ")
        return text
