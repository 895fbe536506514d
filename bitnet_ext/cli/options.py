"""Options that several commands share, as groups that a command takes as one parameter."""

from __future__ import annotations

import functools
import inspect
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

import bitnet_ext as bx
from bitnet_ext.cli.failures import ExitCode, UsageError, fail, guarded

__all__ = ["ModelOptions", "RunOptions", "SamplingOptions", "command"]

_model = functools.partial(typer.Option, rich_help_panel="Model")
_sampling = functools.partial(typer.Option, rich_help_panel="Sampling")
_run = functools.partial(typer.Option, rich_help_panel="Run")


def _complete_model(incomplete: str) -> list[str]:
    """The demo, and folders and .gguf files below what is typed."""
    found = ["demo"] if "demo".startswith(incomplete) else []
    parent = Path(incomplete).parent if not incomplete.endswith("/") else Path(incomplete)
    try:
        entries = sorted(parent.iterdir())
    except OSError:
        return found
    paths = [
        f"{p}/" if p.is_dir() else str(p) for p in entries if p.is_dir() or p.suffix == ".gguf"
    ]
    return found + [p for p in paths if p.startswith(incomplete)]


def _complete_isa(incomplete: str) -> list[str]:
    return [name for name in ("auto", *bx.available_isas()) if name.startswith(incomplete)]


@dataclass(frozen=True)
class ModelOptions:
    """Which checkpoint, and how its keys, values and vocabulary are held."""

    model: Annotated[
        str,
        _model(
            "--model",
            "-m",
            help="A directory, a .gguf file, a Hugging Face id, or `demo`.",
            autocompletion=_complete_model,
        ),
    ] = "demo"
    filename: Annotated[
        str | None,
        _model(help="Weight file to open in a directory or repository."),
    ] = None
    revision: Annotated[
        str | None,
        _model(help="Branch, tag or commit of a Hugging Face repository."),
    ] = None
    offline: Annotated[
        bool,
        _model("--offline", help="Use only files already in the download cache."),
    ] = False
    i2s_layout: Annotated[
        Literal["canonical", "arm", "rows4"],
        _model(help="Byte order of I2_S tensors in a .gguf file."),
    ] = "canonical"
    kv_dtype: Annotated[
        Literal["f32", "f16", "int8"],
        _model(help="Storage of keys and values."),
    ] = "f32"
    head: Annotated[
        Literal["exact", "int8"],
        _model(help="Vocabulary projection."),
    ] = "exact"
    device: Annotated[
        Literal["cpu", "cuda", "auto"],
        _model(help="Where the model runs; `auto`: on a CUDA device where there is one."),
    ] = "cpu"

    precision: Annotated[
        Literal["f32", "f16", "bf16"],
        _model(help="Of attention on a CUDA device; f32 has the CPU's bits."),
    ] = "f32"

    def source(self) -> dict[str, Any]:
        """Arguments of ``open_checkpoint`` besides the path."""
        return {
            "filename": self.filename,
            "revision": self.revision,
            "local_files_only": self.offline,
            "i2s_layout": self.i2s_layout,
        }


@dataclass(frozen=True)
class SamplingOptions:
    """Fields of GenerationConfig; None leaves the model's own default."""

    max_new_tokens: Annotated[
        int | None,
        _sampling("--max-new-tokens", "-n", min=1, help="Most tokens to generate."),
    ] = None
    temperature: Annotated[float | None, _sampling("--temperature", "-t", help="0 is greedy.")] = (
        None
    )
    top_k: Annotated[int | None, _sampling(help="Keep the k likeliest tokens; 0 keeps all.")] = None
    top_p: Annotated[
        float | None,
        _sampling(help="Keep the likeliest tokens up to this probability."),
    ] = None
    min_p: Annotated[
        float | None,
        _sampling(help="Drop tokens below this fraction of the likeliest."),
    ] = None
    repetition_penalty: Annotated[
        float | None,
        _sampling(help="Over 1 makes tokens seen before less likely."),
    ] = None
    seed: Annotated[int | None, _sampling("--seed", "-s", help="Same seed, same text.")] = None
    stop: Annotated[
        list[str] | None,
        _sampling(help="Stop before this text (repeatable)."),
    ] = None
    stop_token_id: Annotated[
        list[int] | None,
        _sampling(help="Stop at this token (repeatable)."),
    ] = None
    ignore_eos: Annotated[
        bool,
        _sampling("--ignore-eos", help="Go on past the model's end of text."),
    ] = False
    min_new_tokens: Annotated[int | None, _sampling(help="Fewest tokens before a stop.")] = None

    def overrides(self, unescape: Callable[[str], str]) -> dict[str, Any]:
        """Keyword arguments of ``model.generate``: only what was given."""
        names = (
            "max_new_tokens temperature top_k top_p min_p repetition_penalty seed min_new_tokens"
        )
        found: dict[str, Any] = {name: getattr(self, name) for name in names.split()}
        found["stop"] = tuple(unescape(text) for text in self.stop) if self.stop else None
        found["stop_token_ids"] = tuple(self.stop_token_id) if self.stop_token_id else None
        found["ignore_eos"] = self.ignore_eos or None
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class RunOptions:
    """How the process runs, and what it says on stderr."""

    threads: Annotated[
        int | None,
        _run(min=1, help="Threads to use; results never depend on it."),
    ] = None
    isa: Annotated[
        str | None,
        _run(
            help="Force an instruction set; `bitnet-ext info` lists them.",
            autocompletion=_complete_isa,
        ),
    ] = None
    quiet: Annotated[bool, _run("--quiet", "-q", help="Only results and errors.")] = False
    debug: Annotated[bool, _run("--debug", help="Show the traceback of an error.")] = False

    def apply(self) -> None:
        """Set threads, ISA and logging of the process."""
        logging.getLogger("bitnet_ext").setLevel(logging.ERROR if self.quiet else logging.WARNING)
        for name in ("BITNET_NUM_THREADS", "BITNET_MEMORY_LIMIT"):  # the engine skips other text
            found = os.environ.get(name) or "1"
            if not found.isdecimal():
                raise UsageError(f"{name}: found {found!r}, wanted a whole number")
        if self.quiet:
            os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        try:
            bx.set_isa(self.isa) if self.isa is not None else bx.get_isa()
        except RuntimeError as error:
            fail(str(error))
            raise typer.Exit(ExitCode.DEVICE) from None
        if self.threads is not None:
            try:
                bx.set_num_threads(self.threads)
            except ValueError as error:
                raise UsageError(f"--threads: {error}") from None


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a typer command: parameters that are option groups become one option a field.

    ``function`` takes a parameter ``run: RunOptions``; errors of its body become exit codes.
    """
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {n: hint for n, hint in hints.items() if is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(
                parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hints[parameter.name])
            )
            continue
        types = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(
                f.name, parameter.KEYWORD_ONLY, default=f.default, annotation=types[f.name]
            )
            for f in fields(group)
        ]

    @functools.wraps(function)
    def wrapper(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in fields(group)})
        run: RunOptions = values["run"]
        with guarded(run.debug):
            run.apply()
            function(**values)

    del wrapper.__dict__["__wrapped__"]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    wrapper.__dict__["__signature__"] = inspect.Signature(parameters)
    return wrapper
