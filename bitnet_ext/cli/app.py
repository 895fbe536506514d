"""The commands put together, and the process's exit code."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from bitnet_ext import __version__
from bitnet_ext.cli.bench import bench
from bitnet_ext.cli.chat import chat
from bitnet_ext.cli.convert import convert
from bitnet_ext.cli.failures import ExitCode, exit_code_table, fail
from bitnet_ext.cli.generate import generate
from bitnet_ext.cli.info import info
from bitnet_ext.cli.score import score

__all__ = ["app", "run"]

_EPILOG = "Exit codes:\n\n" + "\n".join(f"- {code}: {text}" for code, text in exit_code_table())

app = typer.Typer(
    name="bitnet-ext",
    help="Text and scores from ternary (BitNet b1.58) models, on the CPU.\n\n"
    "Results go to stdout; progress, timings and errors to stderr. `--model` defaults to the "
    "demo that comes with the package, which completes Python code.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for _command in (generate, chat, score, bench, info, convert):
    app.command()(_command)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"bitnet-ext {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Show the version and exit.", callback=_show_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def run(arguments: list[str] | None = None) -> int:
    """Run the command line (``sys.argv`` when None) and return its exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text must not fail on a narrow encoding
            stream.reconfigure(errors="replace")
    try:
        code = app(arguments, prog_name="bitnet-ext", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return ExitCode.INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # A wrong option or argument: typer's own error, in the one line of every other.
        message = error.format_message().rstrip(".")
        if message:  # empty where the help was shown instead
            fail(message, "--help lists what is understood")
        return ExitCode.USAGE
    return code if isinstance(code, int) else ExitCode.OK
