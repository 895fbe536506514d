"""The command line's own work: options, escapes, errors, exit codes, information."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
from make_checkpoints import make_hf

import bitnet_ext as bx
from bitnet_ext import cli
from bitnet_ext.cli.app import run
from bitnet_ext.cli.failures import ExitCode, exit_code_table, guarded
from bitnet_ext.cli.inputs import unescaper
from bitnet_ext.cli.options import ModelOptions
from bitnet_ext.cli.terminal import human_bytes

COMMANDS = ("generate", "chat", "score", "bench", "info", "convert")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("cli") / "tiny", "bitnet").path


class Interrupted(ModuleType):
    """A module during whose import Ctrl-C is pressed."""

    def __getattr__(self, name: str) -> object:
        raise KeyboardInterrupt


def program(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from bitnet_ext.cli import main; main()", *arguments]


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"bitnet-ext {bx.__version__}\n"


def test_main_leaves_with_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["bitnet-ext", "frob"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == ExitCode.USAGE
    monkeypatch.setitem(sys.modules, "bitnet_ext.cli.app", Interrupted("app"))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == ExitCode.INTERRUPTED


def test_threads_are_set(
    checkpoint: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "-m", str(checkpoint), "--threads", "1", "--json", "--quiet"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["threads"] == 1
    assert run(["info", "-m", str(checkpoint), "--threads", "5000"]) == ExitCode.USAGE
    assert "--threads: num_threads: found 5000" in capsys.readouterr().err
    assert bx.get_num_threads() == 1


@pytest.mark.parametrize("name", ["BITNET_NUM_THREADS", "BITNET_MEMORY_LIMIT"])
def test_variables_that_are_no_numbers_are_refused(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "2G")
    assert run(["info"]) == ExitCode.USAGE
    assert f"{name}: found '2G', wanted a whole number" in capsys.readouterr().err


def test_help_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert all(f"{code}: " in shown for code, _ in exit_code_table())
    assert {code for code, _ in exit_code_table()} == {int(code) for code in ExitCode}


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_help_and_a_model_that_is_demo(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([name, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--model" in shown
    assert "demo" in shown
    assert "--debug" in shown


def test_without_arguments_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 2
    shown = capsys.readouterr()
    assert "generate" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["generate", "--frob"], 2, "No such option: --frob"),
        (["frob"], 2, "No such command 'frob'"),
        (["generate", "-p", "a", "--kv-dtype", "f99"], 2, "'f99' is not one of"),
        (["generate", "-p", "a", "--max-new-tokens", "-1"], 2, "--max-new-tokens"),
        (["info", "-m", "no/such/place"], 3, "no/such/place: no such file"),
        (["info", "--isa", "mips"], 5, "unknown ISA 'mips'; available: auto, scalar"),
        (["score", "no-such-file.txt"], 2, "no-such-file.txt: No such file"),
        (["convert", "x.gguf", "--to", "safetensors"], 2, "wanted a name without .gguf"),
        (["convert", "folder", "--to", "tq1_0"], 2, "wanted a name that ends in .gguf"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = bx.get_isa()
    assert run(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == "" or arguments[0] == "info"
    assert shown.err.startswith("bitnet-ext: error: ")
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert bx.get_isa() == before


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (bx.errors.CheckpointError("x"), ExitCode.MODEL),
        (bx.errors.UnsupportedModelError("x"), ExitCode.MODEL),
        (bx.errors.ContextLengthError("x"), ExitCode.LIMIT),
        (bx.errors.CacheFullError("x"), ExitCode.LIMIT),
        (MemoryError("x"), ExitCode.LIMIT),
        (bx.errors.DeviceUnavailableError("x"), ExitCode.DEVICE),
        (bx.errors.InvalidShapeError("x"), ExitCode.USAGE),
        (OSError(28, "No space left on device"), ExitCode.FAILED),
        (KeyError("x"), ExitCode.FAILED),
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
    ],
    ids=lambda value: type(value).__name__,
)
def test_each_error_has_its_exit_code(
    error: BaseException, code: ExitCode, capsys: pytest.CaptureFixture[str]
) -> None:
    import typer

    with pytest.raises(typer.Exit) as caught, guarded(debug=False):
        raise error
    assert caught.value.exit_code == code
    assert "Traceback" not in capsys.readouterr().err


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "-m", "no/such/place", "--debug"]) == 3
    shown = capsys.readouterr().err
    assert "Traceback" in shown
    assert "open_checkpoint" in shown


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (r"def f():\n\treturn", "def f():\n\treturn"),
        (r"a\\nb", r"a\nb"),
        (r"\\\n", "\\\n"),
        (r"\d+\.\w", r"\d+\.\w"),
        ("real\nnewline\\", "real\nnewline\\"),
        (r"\r", "\r"),
    ],
)
def test_escapes(written: str, meant: str) -> None:
    assert unescaper(raw=False)(written) == meant
    assert unescaper(raw=True)(written) == written


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1234567, "1.23 MB"), (999_600, "1 MB")],
)
def test_human_bytes(count: int, shown: str) -> None:
    assert human_bytes(count) == shown


def test_info_is_enough_for_a_bug_report(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "--model", str(checkpoint), "--tensors"]) == 0
    shown = capsys.readouterr().out
    for word in (bx.__version__, bx.get_isa(), "kernels", "memory estimate", "kv_cache"):
        assert word in shown
    assert "model.layers.1.mlp.down_proj.weight" in shown
    assert "\x1b" not in shown
    assert not any(line.endswith(" ") for line in shown.splitlines())


def test_info_of_a_device(
    checkpoint: Path, device: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "-m", str(checkpoint), "--json", "--warm"]) == 0
    machine = json.loads(capsys.readouterr().out)["machine"]
    assert machine["cuda"].startswith(f"{device.name}, sm_{device.capability}, ")
    assert machine["cuda_kernels"] == device.warm() > 0


def test_info_without_a_device(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert run(["info", "-m", str(checkpoint)]) == 0
    assert "found no CuPy" in capsys.readouterr().out
    assert run(["info", "-m", str(checkpoint), "--warm"]) == ExitCode.DEVICE


def test_info_as_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "-m", str(checkpoint), "--json", "--seq-len", "100", "-b", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["isa"] == bx.get_isa()
    assert found["machine"]["kernels"].keys() == bx.dispatch_info().keys()
    config = bx.BitNetConfig(**found["model"]["config"])
    estimate = bx.estimate_memory(config, 2, 100, "prefill")
    assert found["model"]["memory_estimate"]["prefill"]["total"] == estimate.total
    first = found["model"]["tensors"][0]
    assert first == {"name": "model.embed_tokens.weight", "type": "BF16", "shape": [320, 256]}


def test_info_counts_tensors_by_type(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "-m", str(checkpoint)]) == 0
    *_, bf16, u8 = capsys.readouterr().out.splitlines()
    assert bf16.split() == ["BF16", "24"]
    assert u8.split() == ["U8", "14"]


def test_a_forced_isa_is_in_force(
    checkpoint: Path, isa: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", "-m", str(checkpoint), "--isa", isa, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["machine"]["isa"] == isa


def test_a_reader_that_left_is_no_traceback(checkpoint: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        program("info", "-m", str(checkpoint)), stdout=writer, stderr=subprocess.PIPE, check=False
    )
    os.close(writer)
    assert done.stderr == b""
    assert done.returncode == ExitCode.PIPE_CLOSED


def test_ctrl_c_leaves_with_130_and_no_traceback(checkpoint: Path) -> None:
    with subprocess.Popen(
        program("chat", "-m", str(checkpoint)),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr
        assert "loaded in" in process.stderr.readline()  # now it waits for standard input
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == ExitCode.INTERRUPTED
        assert process.stderr.read() == ""


def test_completion_of_paths(tmp_path: Path) -> None:
    (hint,) = get_type_hints(ModelOptions, include_extras=True)["model"].__metadata__
    (tmp_path / "models").mkdir()
    for name in ("a.gguf", "a.txt"):
        (tmp_path / name).touch()
    assert hint.autocompletion(f"{tmp_path}/") == [f"{tmp_path}/a.gguf", f"{tmp_path}/models/"]
    assert hint.autocompletion(f"{tmp_path}/m") == [f"{tmp_path}/models/"]
    assert hint.autocompletion(f"{tmp_path}/absent/x") == []


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["gen"], {"generate"}),
        (["generate", "--kv-dtype", ""], {"f32", "f16", "int8"}),
        (["info", "--model", "de"], {"demo"}),
        (["info", "--isa", "s"], {"scalar"}),
    ],
)
def test_bash_completion(typed: list[str], offered: set[str]) -> None:
    done = subprocess.run(
        program(),
        env={
            **os.environ,
            "_BITNET_EXT_COMPLETE": "complete_bash",
            "COMP_WORDS": " ".join(["bitnet-ext", *typed]),
            "COMP_CWORD": str(len(typed)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert offered == set(done.stdout.split())
