"""Exit codes, and how an exception becomes one helpful line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import typer

from bitnet_ext.cli.terminal import human_bytes, stderr
from bitnet_ext.errors import (
    CacheFullError,
    CheckpointError,
    ContextLengthError,
    DeviceUnavailableError,
    InvalidShapeError,
    UnsupportedModelError,
)
from bitnet_ext.memory import memory_stats

__all__ = ["ExitCode", "UsageError", "describe", "exit_code_table", "fail", "guarded"]


class ExitCode(IntEnum):
    """What the process returns; the table in ``bitnet-ext --help`` and README.md is this one."""

    OK = 0
    FAILED = 1
    USAGE = 2
    MODEL = 3
    LIMIT = 4
    DEVICE = 5
    INTERRUPTED = 130
    PIPE_CLOSED = 141


_MEANINGS = {
    ExitCode.OK: "done",
    ExitCode.FAILED: "a file could not be read or written, or a bug (`--debug` shows where)",
    ExitCode.USAGE: "a wrong option, argument or input",
    ExitCode.MODEL: "the model cannot be found, read or run",
    ExitCode.LIMIT: "the text does not fit the model's context or the memory limit",
    ExitCode.DEVICE: "a device or instruction set that this machine lacks",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
    ExitCode.PIPE_CLOSED: "the reader of the output went away (`| head`)",
}


def exit_code_table() -> list[tuple[int, str]]:
    """(code, meaning) of every exit code, in order."""
    return [(int(code), meaning) for code, meaning in _MEANINGS.items()]


class UsageError(Exception):
    """The command line or its input is wrong; the message says what was found and wanted."""


def describe(error: BaseException) -> tuple[ExitCode, str]:
    """The exit code of an exception and what to do about it ("" where its message says so)."""
    if isinstance(error, UsageError | InvalidShapeError):
        return ExitCode.USAGE, ""
    if isinstance(error, UnsupportedModelError):
        return ExitCode.MODEL, "`bitnet-ext info --tensors` lists what the file holds"
    if isinstance(error, CheckpointError):
        return ExitCode.MODEL, ""
    if isinstance(error, ContextLengthError | CacheFullError):
        return ExitCode.LIMIT, "shorten the text, or lower --max-new-tokens"
    if isinstance(error, MemoryError):
        return ExitCode.LIMIT, "`bitnet-ext info --seq-len N` estimates what a text needs"
    if isinstance(error, DeviceUnavailableError):
        return ExitCode.DEVICE, ""
    return ExitCode.FAILED, ""


@contextmanager
def guarded(debug: bool) -> Iterator[None]:
    """Turn what a command raises into a line on stderr and an exit code."""
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let that flush go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(ExitCode.PIPE_CLOSED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own usage errors
            raise
        if debug:
            traceback.print_exc()
        code, advice = describe(error)
        fail(_line(error, code), advice)
        raise typer.Exit(code) from None


def fail(message: str, advice: str = "") -> None:
    """``bitnet-ext: error: message; advice`` on one line of stderr."""
    console = stderr()
    text = " ".join(message.split()) + (f"; {advice}" if advice else "")
    console.print("bitnet-ext: ", end="")
    console.print("error: ", style="bold red", end="")
    console.print(text)


def _line(error: BaseException, code: ExitCode) -> str:
    message = str(error) or type(error).__name__
    if message == "std::bad_alloc":  # all that C++ says
        limit = memory_stats().limit
        return "out of memory" + (f" under the limit of {human_bytes(limit)}" if limit else "")
    if code is not ExitCode.FAILED or isinstance(error, OSError):
        return message
    return f"{type(error).__name__}: {message} (this may be a bug; --debug shows where)"
