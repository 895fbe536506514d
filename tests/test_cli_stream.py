"""Streamed text: whole on a pipe, and what a terminal's screen shows in the end."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest

from bitnet_ext.cli import stream
from bitnet_ext.cli.stream import Speed, TextStream


class Terminal(io.StringIO):
    """A stdout that calls itself a terminal; ``screen()`` is what stands on it."""

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        lines, row, column = [""], 0, 0
        for code, char in re.findall(r"\x1b\[([?\d;]*[a-zA-Z])|(.|\n)", self.getvalue()):
            if code.endswith("A"):
                row -= int(code[:-1])
            elif code == "2K":
                lines[row] = ""
            elif code:
                assert code[-1] in "mhl", f"an escape code this screen does not know: {code}"
            elif char == "\r":
                column = 0
            elif char == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            else:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + char + line[column + 1 :]
                column += 1
        self.cursor = (row, column)
        while lines and not lines[-1]:
            lines.pop()
        return lines


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("LINES", "12")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(stream, "_FRAME", 0.0)  # draw at every write
    return Terminal()


def write(pieces: list[str], quiet: bool = False) -> None:
    with TextStream(Speed(), quiet) as out:
        for piece in pieces:
            out.write(piece)


def show(terminal: Terminal, pieces: list[str], quiet: bool = False) -> None:
    """Stream ``pieces`` to the terminal; both outputs are terminals."""
    with redirect_stdout(terminal), redirect_stderr(Terminal()):
        write(pieces, quiet)


@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_pipe_gets_the_text_unchanged(ending: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "def f():\n\treturn '\x1b[31m'" + ending
    write([text[i : i + 3] for i in range(0, len(text), 3)])
    assert capsys.readouterr().out == text


@pytest.mark.parametrize("size", [1, 4, 1000])
@pytest.mark.parametrize("ending", ["", "\n"])
def test_a_terminal_shows_the_text_once(terminal: Terminal, size: int, ending: str) -> None:
    text = "def f(x):\n    return x\n\n\nprint(f(1))" + ending
    show(terminal, [text[i : i + size] for i in range(0, len(text), size)])
    assert terminal.screen() == text.rstrip("\n").split("\n")
    assert terminal.cursor == (5, 0)


def test_the_speed_is_drawn_while_text_comes(terminal: Terminal) -> None:
    with (
        redirect_stdout(terminal),
        redirect_stderr(Terminal()),
        TextStream(Speed()) as out,
    ):
        out.write("half a line")
        assert terminal.screen()[:2] == ["half a line", "0 tokens"]
        out.write(", and its end\nnext")
        assert terminal.screen()[:3] == ["half a line, and its end", "next", "0 tokens"]


def test_a_line_longer_than_the_screen_is_still_whole(terminal: Terminal) -> None:
    words = ["word "] * 400
    show(terminal, [*words, "\nend"])
    shown = [line for line in terminal.screen() if line]
    assert "".join(shown[:-1]).replace(" ", "") == "word" * 400
    assert shown[-1] == "end"


def test_a_quiet_terminal_gets_plain_text_and_a_last_newline(terminal: Terminal) -> None:
    show(terminal, ["a\n", "b"], quiet=True)
    assert terminal.getvalue() == "a\nb\n"


def test_a_text_cannot_steer_the_terminal(terminal: Terminal) -> None:
    show(terminal, ["a\x1b[2Jb\x07c\r\n"], quiet=True)
    assert terminal.getvalue() == "a\\x1b[2Jb\\x07c\\x0d\n"


def test_speed_counts_from_the_first_token(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 10.0
    monkeypatch.setattr(stream, "perf_counter", lambda: now)
    speed = Speed()
    assert str(speed) == "0 tokens"
    now = 12.0
    speed.count(1)
    assert str(speed) == "1 token, first after 2.00 s"
    speed.count(0)
    now = 14.0
    speed.count(10)
    assert str(speed) == "11 tokens, first after 2.00 s, then 5 tokens/s"
