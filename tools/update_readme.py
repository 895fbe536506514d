"""Run README.md's commands and Python lines and put their output in its "text" blocks.

    PYTHONPATH=. python tools/update_readme.py

A "bash" block that a "text" block follows must end in a bitnet-ext command; its prompt is shown
before the text, as on a terminal. Needs the built extension. tests/test_readme.py checks that
nothing would change.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path
from typing import Any

README = Path(__file__).parents[1] / "README.md"
BLOCK = re.compile(r"```(\w+)\n(.*?)```", re.DOTALL)


def renewed(text: str) -> str:
    """``text`` with the output as it is now; every Python block runs, in one namespace."""
    names: dict[str, Any] = {}
    blocks = list(BLOCK.finditer(text))
    following: list[re.Match[str] | None] = [*blocks[1:], None]
    pieces, copied = [], 0
    for block, after in zip(blocks, following, strict=True):
        shows = after is not None and after[1] == "text"
        if block[1] != "python" and not (shows and block[1] == "bash"):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            _run(block[1], block[2], names)
        if after is not None and shows:
            pieces += [text[copied : after.start(2)], printed.getvalue().rstrip("\n") + "\n"]
            copied = after.end(2)
    return "".join([*pieces, text[copied:]])


def _run(language: str, code: str, names: dict[str, Any]) -> None:
    if language == "python":
        exec(compile(code, "README.md", "exec"), names)
        return
    from bitnet_ext.cli.app import run

    arguments = shlex.split(code.rpartition(" && ")[2])[1:]
    if failure := run([*arguments, "--echo"]):
        raise SystemExit(f"README.md: {code.strip()}: exit code {failure}")


if __name__ == "__main__":
    README.write_text(renewed(README.read_text(encoding="utf-8")), encoding="utf-8")
