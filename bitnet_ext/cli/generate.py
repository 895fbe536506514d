"""``bitnet-ext generate``: continue one prompt or several."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.failures import UsageError
from bitnet_ext.cli.inputs import read_file, read_stdin, unescaper
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, SamplingOptions, command
from bitnet_ext.cli.stream import Speed, TextStream
from bitnet_ext.cli.terminal import note, print_json, progress_bar, stdout

__all__ = ["generate", "sampling_overrides"]


@command
def generate(
    model: ModelOptions,
    sampling: SamplingOptions,
    run: RunOptions,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--prompt",
            "-p",
            help=r"Text to continue; `\n`, `\t`, `\r` and `\\` are read as escapes. `-` reads "
            "standard input as it is. Several run as one batch.",
        ),
    ] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A file of prompts, one a line, with the same escapes.")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Leave backslashes in texts alone.")] = False,
    echo: Annotated[
        bool | None,
        typer.Option(help="Print the prompt before its text. [default: on a terminal]"),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(help="Print text as it comes. [default: for one prompt without --json]"),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON object a prompt; with --stream, one a piece of text."
        ),
    ] = False,
    logprobs: Annotated[
        int | None,
        typer.Option(min=0, help="With --json: log-probabilities of the k likeliest tokens too."),
    ] = None,
) -> None:
    r"""Continue one prompt or several.

    `bitnet-ext generate --prompt "def read_json(path):\n"`
    """
    unescape = unescaper(raw)
    prompts = _prompts(prompt or [], prompts_file, unescape)
    if logprobs is not None and not json:
        raise UsageError("--logprobs: found without --json, wanted with it")
    overrides = sampling_overrides(sampling, unescape)
    if logprobs is not None:
        overrides["logprobs"] = logprobs
    if stream is None:
        stream = len(prompts) == 1 and not json
    if echo is None:
        echo = not json and stdout().is_terminal
    loaded = load(model, run)
    if json:
        (_stream_json if stream else _print_json)(loaded, prompts, overrides)
    elif stream and len(prompts) == 1:
        _stream_text(loaded, prompts[0], overrides, echo, run)
    else:
        _print_text(loaded, prompts, overrides, echo, run)


def sampling_overrides(sampling: SamplingOptions, unescape: Callable[[str], str]) -> dict[str, Any]:
    """The options that were given, checked before a model is loaded.

    Raises:
        UsageError: a value that GenerationConfig refuses.
    """
    from bitnet_ext.generate import GenerationConfig

    overrides = sampling.overrides(unescape)
    try:
        GenerationConfig(**overrides)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return overrides


def _prompts(given: list[str], file: Path | None, unescape: Callable[[str], str]) -> list[str]:
    if given.count("-") > 1:
        raise UsageError("--prompt: found - twice, wanted it once: standard input is read whole")
    prompts = [read_stdin() if text == "-" else unescape(text) for text in given]
    if file is not None:
        prompts += [unescape(line) for line in read_file(file).splitlines()]
    if not prompts:
        raise UsageError(
            "found no prompt, wanted --prompt TEXT, --prompt - for standard input, or "
            "--prompts-file FILE"
        )
    return prompts


def _stream_text(
    model: BitNetModel, prompt: str, overrides: dict[str, Any], echo: bool, run: RunOptions
) -> None:
    speed = Speed()
    reason = "interrupted"
    try:
        with TextStream(speed, run.quiet) as out:
            if echo:
                out.write(prompt)
            for chunk in model.generate(prompt, stream=True, **overrides):
                speed.count(len(chunk.token_ids))
                out.write(chunk.text)
                reason = chunk.finish_reason or reason
    finally:
        note(f"{speed}; {reason}", run.quiet)


def _print_text(
    model: BitNetModel, prompts: list[str], overrides: dict[str, Any], echo: bool, run: RunOptions
) -> None:
    """A batch, each text under a header once all are done, as ``head`` prints several files."""
    speed = Speed()
    texts = [""] * len(prompts)
    open_prompts = len(prompts)
    try:
        with progress_bar("generating", "prompts", run.quiet) as advance:
            for chunk in model.generate(prompts, stream=True, **overrides):
                speed.count(len(chunk.token_ids))
                texts[chunk.index] += chunk.text
                open_prompts -= chunk.finish_reason is not None
                advance(len(prompts) - open_prompts, len(prompts))
    finally:
        note(str(speed), run.quiet)
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        with TextStream(speed, quiet=True) as out:
            if len(prompts) > 1:
                out.write(f"{chr(10) * (i > 0)}==> prompt {i + 1} <==\n")
            text = prompt + text if echo else text
            out.write(text if text.endswith("\n") or len(prompts) == 1 else text + "\n")


def _stream_json(model: BitNetModel, prompts: list[str], overrides: dict[str, Any]) -> None:
    for chunk in model.generate(prompts, stream=True, **overrides):
        print_json(_plain(chunk))


def _print_json(model: BitNetModel, prompts: list[str], overrides: dict[str, Any]) -> None:
    for i, output in enumerate(model.generate(prompts, **overrides)):
        print_json({"index": i, "prompt": prompts[i], **_plain(output)})


def _plain(value: Any) -> Any:
    """Dataclasses and arrays as what JSON knows."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value
