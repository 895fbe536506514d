"""Streamed text on stdout, with the speed beneath it where stdout is a terminal."""

from __future__ import annotations

import sys
from time import perf_counter
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from bitnet_ext.cli.terminal import stderr, stdout

__all__ = ["Speed", "TextStream"]

_FRAME = 1 / 20  # seconds between redrawings
# A model's text must not steer the terminal: escape and its kin are shown, not sent.
_VISIBLE = {c: f"\\x{c:02x}" for c in range(32) if chr(c) not in "\t\n"} | {127: "\\x7f"}


class Speed:
    """Tokens and the time they took, from the first one on."""

    def __init__(self) -> None:
        self._start = perf_counter()
        self._first = self._last = self._start
        self.tokens = 0

    def count(self, tokens: int) -> None:
        """Note that ``tokens`` more are there."""
        if tokens <= 0:
            return
        self._last = perf_counter()
        if self.tokens == 0:
            self._first = self._last
        self.tokens += tokens

    def __str__(self) -> str:
        text = f"{self.tokens} token{'s' * (self.tokens != 1)}"
        if self.tokens:
            text += f", first after {self._first - self._start:.2f} s"
        if self.tokens > 1 and self._last > self._first:
            text += f", then {(self.tokens - 1) / (self._last - self._first):.0f} tokens/s"
        return text


class TextStream:
    """A context manager whose ``write`` puts text on stdout as it comes.

    On a terminal whole lines are printed, and the unfinished one stands with the speed in a
    region that is redrawn; elsewhere the text passes unchanged.
    """

    def __init__(self, speed: Speed, quiet: bool = False) -> None:
        self._speed = speed
        self._line = ""
        self._ends_line = True
        self._drawn = 0.0
        console = stdout()
        self._console = console if console.is_terminal else None
        self._live: Live | None = None
        if self._console and not quiet and stderr().is_terminal and not console.is_dumb_terminal:
            self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._leave_live()
        # A terminal's next line must begin at its left; a pipe gets the text and nothing else.
        if self._console is not None:
            self.end_line()

    def end_line(self) -> None:
        """Begin a new line unless the text just ended one."""
        if not self._ends_line:
            self.write("\n")

    def write(self, text: str) -> None:
        """Put ``text`` on stdout."""
        if not text:
            return
        self._ends_line = text.endswith("\n")
        if self._console is not None:
            text = text.translate(_VISIBLE)
        if self._live is None:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        *whole, self._line = (self._line + text).split("\n")
        for line in whole:
            self._live.console.print(Text(line), soft_wrap=True)
        if self._too_tall(self._live.console):
            self._leave_live()
        elif whole or perf_counter() - self._drawn > _FRAME:
            self._drawn = perf_counter()
            self._live.update(
                Group(Text(self._line, overflow="fold"), Text(str(self._speed), style="dim")),
                refresh=True,
            )

    def _too_tall(self, console: Console) -> bool:
        """Whether the unfinished line fills the screen, so that it cannot be redrawn."""
        return cell_len(self._line) >= console.width * max(1, console.height - 3)

    def _leave_live(self) -> None:
        """Erase the redrawn region and print its text for good."""
        if self._live is None:
            return
        live, self._live = self._live, None
        live.stop()
        sys.stdout.write(self._line)
        sys.stdout.flush()
        self._line = ""
