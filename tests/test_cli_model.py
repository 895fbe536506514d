"""Each command on a real, tiny model: what reaches stdout, stderr and the exit code."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import make_hf

import bitnet_ext as bx
from bitnet_ext.cli.app import run
from bitnet_ext.cli.failures import ExitCode

PROMPT = "def read_json(path):\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_hf(tmp_path_factory.mktemp("cli") / "tiny", "bitnet").path)


@pytest.fixture(scope="module")
def model(path: str) -> bx.BitNetModel:
    return bx.BitNetModel.from_pretrained(path)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> io.BytesIO:
    """Standard input that is not a terminal, for :func:`feed`."""
    data = io.BytesIO()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(data, encoding="utf-8"))
    return data


def feed(stdin: io.BytesIO, text: str) -> None:
    stdin.seek(0)
    stdin.truncate()
    stdin.write(text.encode())
    stdin.seek(0)


def generate(path: str, *arguments: str) -> int:
    return run(["generate", "-m", path, *arguments])


# --- generate -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["--stream", "--no-stream"])
def test_generate_prints_the_text_alone(
    path: str, model: bx.BitNetModel, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(PROMPT, max_new_tokens=12, ignore_eos=True)
    options = ["--prompt", r"def read_json(path):\n", "-n", "12", "--ignore-eos", how]
    assert generate(path, *options) == 0
    shown = capsys.readouterr()
    assert shown.out == expected.text
    assert "12 tokens" in shown.err
    assert "tokens/s" in shown.err
    assert path in shown.err
    assert "\x1b" not in shown.err


def test_generate_echo_and_quiet(
    path: str, model: bx.BitNetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(path, "-p", "def", "-n", "4", "--echo", "--quiet") == 0
    shown = capsys.readouterr()
    assert shown.out == "def" + model.generate("def", max_new_tokens=4).text
    assert shown.err == ""


def test_generate_reads_standard_input_as_it_is(
    path: str, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(stdin, "a\\nb\nc")
    assert generate(path, "-p", "-", "-n", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["prompt"] == "a\\nb\nc"


def test_generate_json_has_ids_reason_and_logprobs(
    path: str, model: bx.BitNetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = model.generate(PROMPT, max_new_tokens=5, logprobs=2, ignore_eos=True)
    options = ["-n", "5", "--json", "--logprobs", "2", "--ignore-eos"]
    assert generate(path, "-p", r"def read_json(path):\n", *options) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == PROMPT
    assert found["text"] == expected.text
    assert found["token_ids"] == list(expected.token_ids)
    assert found["prompt_token_ids"] == list(expected.prompt_token_ids)
    assert found["finish_reason"] == "length"
    assert len(found["logprobs"]) == 5


def test_generate_batch_gives_each_text_as_alone(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("for line in\nthe quick\\n\n")
    options = ["-n", "6", "--ignore-eos", "--json"]
    assert generate(path, "-p", "def", "--prompts-file", str(file), *options) == 0
    together = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [found["prompt"] for found in together] == ["def", "for line in", "the quick\n"]
    for found in together:
        assert generate(path, "-p", found["prompt"], "--raw", *options) == 0
        alone = json.loads(capsys.readouterr().out)
        assert alone["token_ids"] == found["token_ids"]


def test_generate_batch_as_text_has_headers(
    path: str, model: bx.BitNetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(path, "-p", "def", "-p", "for", "-n", "3", "--ignore-eos") == 0
    texts = [model.generate(p, max_new_tokens=3, ignore_eos=True).text for p in ("def", "for")]
    first, second = (text if text.endswith("\n") else text + "\n" for text in texts)
    assert capsys.readouterr().out == f"==> prompt 1 <==\n{first}\n==> prompt 2 <==\n{second}"


def test_generate_stream_json_joins_to_the_text(
    path: str, model: bx.BitNetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(path, "-p", "def", "-n", "9", "--ignore-eos", "--json", "--stream") == 0
    chunks = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = model.generate("def", max_new_tokens=9, ignore_eos=True)
    assert "".join(chunk["text"] for chunk in chunks) == expected.text
    assert [i for chunk in chunks for i in chunk["token_ids"]] == list(expected.token_ids)
    assert [chunk["finish_reason"] for chunk in chunks][-1] == "length"


def test_generate_passes_every_sampling_option_on(
    path: str, model: bx.BitNetModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {
        "max_new_tokens": 20,
        "temperature": 1.5,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.001,
        "repetition_penalty": 1.2,
        "seed": 7,
        "min_new_tokens": 2,
    }
    flags = [word for k, v in options.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    flags += ["--stop", r"\n", "--stop", "e", "--stop-token-id", "5", "--json"]
    assert generate(path, "-p", "def", *flags) == 0
    found = json.loads(capsys.readouterr().out)
    expected = model.generate("def", stop=("\n", "e"), stop_token_ids=(5,), **options)
    assert found["token_ids"] == list(expected.token_ids)
    assert found["finish_reason"] == expected.finish_reason


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["-p", "a", "-t", "-1"], 2, "temperature"),
        (["-p", "a", "--logprobs", "1"], 2, "--json"),
        (["-p", "-", "-p", "-"], 2, "- twice"),
        ([], 2, "--prompt TEXT"),
        (["--prompts-file", "absent.txt"], 2, "absent.txt: No such file"),
        (["-p", "a" * 600, "-n", "600"], 4, "512"),
    ],
)
def test_generate_errors(
    path: str, arguments: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate(path, "--quiet", *arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert said in shown.err
    assert shown.err.count("\n") == 1


def test_bytes_that_are_not_text_are_named(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "latin1.txt"
    file.write_bytes(b"caf\xe9 noir")
    assert run(["score", "-m", path, str(file)]) == ExitCode.USAGE
    assert "found byte 0xe9 at 3, wanted UTF-8 text" in capsys.readouterr().err


# --- chat ---------------------------------------------------------------------------------------


def test_chat_answers_each_line_of_a_pipe(
    path: str, model: bx.BitNetModel, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(stdin, "the quick fox\n\n/reset\nwhy\n/nonsense\n/exit\nnever read\n")
    assert run(["chat", "-m", path, "--system", "Be brief", "-n", "8", "--json"]) == 0
    shown = capsys.readouterr()
    answers = [json.loads(line)["text"] for line in shown.out.splitlines()]
    system = {"role": "system", "content": "Be brief"}
    expected = [
        model.chat([system, {"role": "user", "content": text}], max_new_tokens=8).text
        for text in ("the quick fox", "why")
    ]
    assert answers == expected
    assert "/nonsense: no such command" in shown.err
    assert "conversation is forgotten" in shown.err


def test_chat_remembers(
    path: str, model: bx.BitNetModel, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(stdin, "the quick fox\nwhy\n")
    assert run(["chat", "-m", path, "-n", "5", "-q"]) == 0
    messages = [{"role": "user", "content": "the quick fox"}]
    first = model.chat(messages, max_new_tokens=5).text
    messages += [
        {"role": "assistant", "content": first},
        {"role": "user", "content": "why"},
    ]
    second = model.chat(messages, max_new_tokens=5).text
    expected = "".join(text if text.endswith("\n") else text + "\n" for text in (first, second))
    assert capsys.readouterr().out == expected


def test_chat_without_a_template_says_to_use_generate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_hf(tmp_path / "plain", "bitnet")
    config = made.path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    del settings["chat_template"]
    config.write_text(json.dumps(settings))
    assert run(["chat", "-q", "-m", str(made.path)]) == ExitCode.MODEL
    assert "generate" in capsys.readouterr().err


class Keyboard(io.StringIO):
    """A standard input that calls itself a terminal."""

    def isatty(self) -> bool:
        return True


def test_chat_with_a_keyboard(
    path: str,
    model: bx.BitNetModel,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:

    def keys() -> Iterator[str]:
        yield from ("the quick", "a" * 600, "  ", "why")
        raise EOFError

    typed = keys()
    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    assert run(["chat", "-m", path, "-n", "4"]) == 0
    shown = capsys.readouterr()
    answers = []
    messages: list[dict[str, str]] = []
    for text in ("the quick", "why"):  # what did not fit is not part of the conversation
        messages.append({"role": "user", "content": text})
        answers.append(model.chat(messages, max_new_tokens=4).text)
        messages.append({"role": "assistant", "content": answers[-1]})
    assert shown.out == "".join(text if text.endswith("\n") else text + "\n" for text in answers)
    assert "/reset begins a new conversation" in shown.err


def test_chat_survives_an_interrupted_answer(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "stdin", Keyboard())
    monkeypatch.setattr(bx.BitNetModel, "decode_largest", interrupt)
    typed = iter(["the quick", "/exit"])
    monkeypatch.setattr("builtins.input", lambda: next(typed))
    assert run(["chat", "-m", path, "--ignore-eos"]) == 0
    assert "1 token, first after" in (shown := capsys.readouterr().err)
    assert "interrupted" in shown
    monkeypatch.setattr("builtins.input", interrupt)
    assert run(["chat", "-m", path]) == ExitCode.INTERRUPTED
    monkeypatch.setattr(sys, "stdin", io.StringIO("the quick\n"))
    assert run(["chat", "-m", path, "--ignore-eos"]) == ExitCode.INTERRUPTED


# --- score --------------------------------------------------------------------------------------


def test_score_of_files_and_their_total(
    path: str, model: bx.BitNetModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a.py": "def f():\n    return 1\n", "b.py": "the quick brown fox é"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    files = [str(tmp_path / name) for name in texts]
    assert run(["score", "-m", path, "--json", *files]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    for row, file, text in zip(rows, files, texts.values(), strict=True):
        expected = model.score(text)
        assert row["file"] == file
        assert row["bytes"] == len(text.encode())
        assert row["tokens"] == expected.num_tokens
        assert row["log_probability"] == pytest.approx(expected.total)
        assert row["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
        assert row["perplexity"] == pytest.approx(expected.perplexity)
    assert run(["score", "-m", path, *files]) == 0
    header, *shown = capsys.readouterr().out.splitlines()
    assert header.split() == ["file", "bytes", "tokens", "bits/byte", "perplexity", "greedy"]
    total = -sum(row["log_probability"] for row in rows) / math.log(2)
    assert shown[2].split()[0] == "total"
    bits = total / sum(row["bytes"] for row in rows)
    assert float(shown[2].split()[3]) == pytest.approx(bits, abs=1e-4)


def test_score_reads_standard_input(
    path: str, stdin: io.BytesIO, capsys: pytest.CaptureFixture[str]
) -> None:
    feed(stdin, "the quick brown fox")
    assert run(["score", "-m", path, "-q"]) == 0
    assert "standard input" in capsys.readouterr().out
    feed(stdin, "")
    assert run(["score", "-m", path, "-q", "-", "-"]) == ExitCode.USAGE
    assert run(["score", "-m", path, "-q"]) == ExitCode.USAGE


# --- bench and convert --------------------------------------------------------------------------


def test_bench_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--prompt-tokens", "20", "--new-tokens", "3", "-b", "2", "-r", "2"]
    assert run(["bench", "--preset", "tiny", "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == "tiny"
    assert found["machine"]["isa"] == bx.get_isa()
    tests = [(row["test"], row["tokens"], len(row["seconds"])) for row in found["results"]]
    assert tests == [
        ("prefill", 40, 2),
        ("decode", 6, 2),
        ("greedy", 6, 2),
        ("forward_full", 40, 2),
    ]
    for row in found["results"]:
        seconds = sorted(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / np.median(seconds))
    assert run(["bench", "--preset", "tiny", *sizes]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "test",
        "prefill",
        "decode",
        "greedy",
        "forward_full",
    ]


def test_bench_beyond_the_context_is_refused(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "-q", "-m", path, "--prompt-tokens", "513"]) == ExitCode.USAGE
    assert "context of 512" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["safetensors", "tq1_0", "tq2_0", "i2_s"])
def test_convert_keeps_the_model(
    path: str,
    model: bx.BitNetModel,
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    target = tmp_path / ("out" if form == "safetensors" else "out.gguf")
    assert run(["convert", "-m", path, str(target), "--to", form]) == 0
    shown = capsys.readouterr()
    assert shown.out == ""
    assert str(target) in shown.err
    ids = np.arange(40) % 300
    expected = model.forward_full(ids)
    found = bx.BitNetModel.from_pretrained(target).forward_full(ids)
    if form in ("safetensors", "i2_s"):
        np.testing.assert_array_equal(found, expected)
    else:  # scales rounded to float16
        assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.999
    assert run(["convert", "-q", "-m", path, str(target), "--to", form]) == ExitCode.USAGE
    assert "--force" in capsys.readouterr().err
    assert run(["convert", "-q", "-m", path, str(target), "--to", form, "--force"]) == 0


def test_convert_needs_a_place_to_write_to(
    path: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "absent" / "out.gguf"
    assert run(["convert", "-q", "-m", path, str(target)]) == ExitCode.USAGE
    assert f"found no directory {target.parent}" in capsys.readouterr().err


def test_a_memory_limit_that_nothing_fits(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    bx.set_memory_limit(100_000)
    try:
        assert generate(path, "-q", "-p", "def") == ExitCode.LIMIT
    finally:
        bx.set_memory_limit(None)
    assert "out of memory under the limit of 100 kB" in capsys.readouterr().err
