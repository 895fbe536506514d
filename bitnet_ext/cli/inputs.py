r"""Texts from the command line, from files and from standard input.

Bash passes ``"def f():\n"`` on as a backslash and an n, so that is how a newline is written in
an option's text; files and standard input are taken as they are.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

from bitnet_ext.cli.failures import UsageError

__all__ = ["read_file", "read_stdin", "unescaper"]

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def unescaper(raw: bool) -> Callable[[str], str]:
    r"""A function that turns \n, \t, \r and \\ into what they stand for; with ``raw``, nothing.

    A backslash before anything else stays, so that most regular expressions and Windows paths
    survive; a literal backslash-n is written ``\\n``.
    """
    if raw:
        return lambda text: text
    return lambda text: re.sub(r"\\([ntr\\])", lambda found: _ESCAPES[found[1]], text)


def read_file(path: Path) -> str:
    """A UTF-8 file's text, newlines as they are.

    Raises:
        UsageError: absent, unreadable or not UTF-8.
    """
    try:
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror or error}") from None


def read_stdin() -> str:
    """All of standard input as UTF-8.

    Raises:
        UsageError: it is not UTF-8.
    """
    return _decode(sys.stdin.buffer.read(), "standard input")


def _decode(data: bytes, name: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}: found byte 0x{data[error.start]:02x} at {error.start}, wanted UTF-8 text"
        ) from None
