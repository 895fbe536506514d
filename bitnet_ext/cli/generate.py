"""``bitnet-ext generate``: continue one prompt or several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.failures import UsageError
from bitnet_ext.cli.inputs import read_file, read_stdin, unescaper
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, SamplingOptions, command
from bitnet_ext.cli.stream import Speed, TextStream
from bitnet_ext.cli.terminal import note, print_json, progress_bar, stdout

if TYPE_CHECKING:
    from bitnet_ext.generate import GenerationOutput

__all__ = ["generate", "interruption_noted", "sampling_overrides", "summary"]


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
    stream = model.generate(prompt, stream=True, **overrides)
    with interruption_noted(speed, run.quiet), TextStream(speed, run.quiet) as out:
        if echo:
            out.write(prompt)
        for chunk in stream:
            speed.count(len(chunk.token_ids))
            out.write(chunk.text)
    note(summary(stream.outputs()), run.quiet)


@contextmanager
def interruption_noted(speed: Speed, quiet: bool) -> Iterator[None]:
    """On Ctrl-C, say on stderr how far the text came."""
    try:
        yield
    except KeyboardInterrupt:
        note(f"{speed}; interrupted", quiet)
        raise


def summary(outputs: list[GenerationOutput]) -> str:
    """Tokens, times and the end of a call, in one line."""
    times, new = outputs[0].timings, sum(len(output.token_ids) for output in outputs)
    text = f"prompt: {times.prefill_tokens} tokens in {times.prefill_seconds:.3f} s; text: {new}"
    text += f" tokens, {times.decode_tokens_per_second:.0f} tokens/s"
    if len(outputs) == 1:
        text += f"; finished by {outputs[0].finish_reason}"
    return text if outputs[0].seed is None else f"{text}; seed {outputs[0].seed}"


def _print_text(
    model: BitNetModel, prompts: list[str], overrides: dict[str, Any], echo: bool, run: RunOptions
) -> None:
    """A batch, each text under a header once all are done, as ``head`` prints several files."""
    speed, done = Speed(), 0
    stream = model.generate(prompts, stream=True, **overrides)
    with (
        interruption_noted(speed, run.quiet),
        progress_bar("generating", "prompts", run.quiet) as advance,
    ):
        for chunk in stream:
            speed.count(len(chunk.token_ids))
            done += chunk.finish_reason is not None
            advance(done, len(prompts))
    outputs = stream.outputs()
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        with TextStream(speed, quiet=True) as out:
            if len(prompts) > 1:
                out.write(("\n" if i else "") + f"==> prompt {i + 1} <==\n")
            out.write(prompt + output.text if echo else output.text)
            if len(prompts) > 1:
                out.end_line()
    note(summary(outputs), run.quiet)


def _stream_json(model: BitNetModel, prompts: list[str], overrides: dict[str, Any]) -> None:
    for chunk in model.generate(prompts, stream=True, **overrides):
        print_json(chunk)


def _print_json(model: BitNetModel, prompts: list[str], overrides: dict[str, Any]) -> None:
    for i, output in enumerate(model.generate(prompts, **overrides)):
        print_json({"index": i, "prompt": prompts[i], **vars(output)})
