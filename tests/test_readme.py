"""What README.md shows is what happens: commands, Python lines, their output, tables."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from bitnet_ext.cli.app import run
from bitnet_ext.cli.failures import exit_code_table

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```bash\n(.*?)```", TEXT, re.DOTALL)
    for line in block.splitlines()
]


def test_commands_and_python_lines_print_what_is_shown() -> None:
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "tools/update_readme.py")
    assert spec
    assert spec.loader
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert tool.renewed(TEXT) == TEXT, "run tools/update_readme.py"


def test_two_commands_for_a_fresh_machine() -> None:
    install = "python3 -m venv .venv && .venv/bin/pip install . && .venv/bin/bitnet-ext generate "
    assert COMMANDS[0] == install + '--prompt "def read_json(path):\\n"'
    assert COMMANDS[1] == '.venv/bin/pip install ".[test]" && .venv/bin/pytest'
    assert 'pip install ".[test]" && pytest' in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("line", [line for line in COMMANDS[2:] if "bitnet-ext" in line])
def test_commands_use_options_that_exist(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = shlex.split(re.split(r"[#>]", line[line.index("bitnet-ext") :])[0])[1:]
    command = [] if words[0].startswith("-") else words[:1]
    assert run([*command, "--help"]) == 0
    known = re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out)
    for word in words:
        assert not word.startswith("-") or word == "-" or word in known


def test_exit_codes() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", TEXT, re.MULTILINE)
    assert [(int(code), text.replace("\\|", "|")) for code, text in rows] == exit_code_table()
