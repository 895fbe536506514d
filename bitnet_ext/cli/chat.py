"""``bitnet-ext chat``: a conversation, whose earlier turns stay in the cache."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.failures import fail
from bitnet_ext.cli.generate import interruption_noted, sampling_overrides, summary
from bitnet_ext.cli.inputs import unescaper
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, SamplingOptions, command
from bitnet_ext.cli.stream import Speed, TextStream
from bitnet_ext.cli.terminal import note, print_json, stderr
from bitnet_ext.errors import ContextLengthError
from bitnet_ext.memory.kv_cache import KVCache

__all__ = ["chat"]

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves"


@command
def chat(
    model: ModelOptions,
    sampling: SamplingOptions,
    run: RunOptions,
    system: Annotated[
        str | None, typer.Option(help="System prompt, with the escapes of generate.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object an answer.")] = False,
) -> None:
    """Talk with a model that has a chat template.

    Each line is one message; from a pipe, each line of standard input. `/reset` forgets the
    conversation, `/exit` leaves. Ctrl-C stops an answer; the conversation goes on without it.
    """
    unescape = unescaper(raw=False)
    overrides = sampling_overrides(sampling, unescape)
    loaded = load(model, run)
    start = [] if system is None else [{"role": "system", "content": unescape(system)}]
    # A model without a template fails here, before anything is typed.
    loaded.tokenizer.apply_chat_template([*start, {"role": "user", "content": "Hello"}])
    interactive = sys.stdin.isatty()
    if interactive:
        note(_HELP, run.quiet)
    _converse(loaded, start, overrides, interactive, json, run)


def _converse(
    model: BitNetModel,
    start: list[dict[str, str]],
    overrides: dict[str, Any],
    interactive: bool,
    json: bool,
    run: RunOptions,
) -> None:
    cache = model.new_cache()
    messages = list(start)
    while (text := _next_message(interactive)) is not None:
        if text == "/exit":
            return
        if text == "/reset":
            messages = list(start)
            cache.reset()
            note("the conversation is forgotten", run.quiet)
        elif text.startswith("/"):
            note(f"{text.split()[0]}: no such command; {_HELP}")
        elif text.strip():
            turn = [*messages, {"role": "user", "content": text}]
            try:
                answer = _answer(model, turn, cache, overrides, json, run)
            except KeyboardInterrupt:
                if not interactive:
                    raise
                continue
            except ContextLengthError as error:
                if not interactive:
                    raise
                fail(str(error), "/reset begins a new conversation")
                continue
            messages = [*turn, {"role": "assistant", "content": answer}]


def _next_message(interactive: bool) -> str | None:
    """The next line; None at the end of input."""
    if not interactive:
        line = sys.stdin.readline()
        return line.rstrip("\n") if line else None
    import readline  # noqa: F401  (line editing and history for input())

    stderr().print("> ", style="bold", end="")
    try:
        return input()
    except EOFError:
        stderr().print()
        return None


def _answer(
    model: BitNetModel,
    messages: list[dict[str, str]],
    cache: KVCache,
    overrides: dict[str, Any],
    json: bool,
    run: RunOptions,
) -> str:
    """Stream one answer to stdout and return it whole."""
    speed = Speed()
    stream = model.chat(messages, stream=True, cache=cache, **overrides)
    with interruption_noted(speed, run.quiet), TextStream(speed, quiet=run.quiet or json) as out:
        for chunk in stream:
            speed.count(len(chunk.token_ids))
            if not json:
                out.write(chunk.text)
        if not json:
            out.end_line()
    (output,) = stream.outputs()
    note(f"{summary([output])}; {int(cache.length[0])} tokens in the cache", run.quiet)
    if json:
        print_json(output)
    return output.text
