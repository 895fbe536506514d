"""The program as a process: pipes that close, Ctrl-C, a terminal."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from make_checkpoints import make_hf

from bitnet_ext.cli.failures import ExitCode

PROMPT = "def read_json(path):\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_hf(tmp_path_factory.mktemp("cli") / "tiny", "bitnet").path)


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from bitnet_ext.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def endless(tmp_path: Path) -> list[str]:
    """A generation so long that whatever interrupts it comes first."""
    made = make_hf(tmp_path / "long", "bitnet", max_position_embeddings=70_000)
    return ["generate", "-m", str(made.path), "-p", "def", "-n", "60000", "--ignore-eos", "-t", "9"]


def test_ctrl_c_keeps_the_text_so_far(endless: list[str]) -> None:
    with start(*endless) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1)  # text has begun
        process.send_signal(signal.SIGINT)
        code = process.wait(60)
        shown = process.stderr.read()
    assert code == ExitCode.INTERRUPTED
    assert "interrupted" in shown
    assert "Traceback" not in shown


def test_a_reader_that_leaves_is_no_error(endless: list[str]) -> None:
    with start(*endless) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.read(1)
        process.stdout.close()
        code = process.wait(60)
        shown = process.stderr.read()
    assert code == ExitCode.PIPE_CLOSED
    assert "error" not in shown


# The pseudo-terminal has to be the process's own for Ctrl-C to reach it.
ON_A_TERMINAL = """
import fcntl, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from bitnet_ext.cli import main
main()
"""


class Screen:
    """A process on a pseudo-terminal: what it shows, and keys typed into it."""

    def __init__(self, *arguments: str) -> None:
        self._ours, theirs = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": "1"},
        )
        os.close(theirs)
        self.shown, self._seen = "", 0

    def until(self, text: str) -> None:
        """Read until ``text`` has been shown, after what earlier calls waited for."""
        while text not in self.shown[self._seen :]:
            assert select.select([self._ours], [], [], 60)[0], f"{text!r} not in {self.shown!r}"
            self.shown += os.read(self._ours, 4096).decode(errors="replace")
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def end(self) -> int:
        code = self.process.wait(60)
        os.close(self._ours)
        return code


def test_chat_on_a_terminal(path: str) -> None:
    screen = Screen("chat", "-m", path, "-n", "4")
    screen.until("/exit or Ctrl-D leaves")
    screen.until("> ")
    screen.type("the quick\n")
    screen.until("tokens in the cache")
    screen.until("> ")
    screen.type("/exit\n")
    assert screen.end() == 0
    assert "Traceback" not in screen.shown


def test_ctrl_c_in_a_chat_stops_the_answer_then_the_program(endless: list[str]) -> None:
    screen = Screen("chat", *endless[1:3], *endless[5:])
    screen.until("> ")
    screen.type("the quick\n")
    screen.until("tokens/s")
    screen.type("\x03")
    screen.until("interrupted")
    screen.until("> ")
    for _ in range(30):  # readline does not see a key pressed just before it begins to wait
        screen.type("\x03")
        with suppress(subprocess.TimeoutExpired):
            screen.process.wait(2)
            break
    assert screen.end() == ExitCode.INTERRUPTED
    assert "Traceback" not in screen.shown
