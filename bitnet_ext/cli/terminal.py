"""Where the command line writes: results to stdout, everything else to stderr."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

__all__ = ["human_bytes", "note", "print_json", "print_table", "progress_bar", "stderr", "stdout"]

_UNLIMITED = 10_000  # columns: a pipe gets every column of a table whole

Advance = Callable[[int, int], None]


class _Stdout(Console):
    def on_broken_pipe(self) -> None:
        raise  # (within rich's except block; its own answer is exit code 1)


def stdout() -> Console:
    """A console on the present ``sys.stdout``; plain text unless that is a terminal."""
    console = _Stdout(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _UNLIMITED
    return console


def stderr() -> Console:
    """A console on the present ``sys.stderr``."""
    return Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)


def note(text: str, quiet: bool = False) -> None:
    """One line about the run (model, timings) on stderr."""
    if not quiet:
        stderr().print(text, style="dim")


def print_json(value: Any) -> None:
    """One JSON document on one line of stdout; dataclasses become objects, arrays lists."""
    sys.stdout.write(json.dumps(_plain(value), ensure_ascii=False) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    """Dataclasses and arrays as what JSON knows."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if hasattr(value, "tolist") else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
    """Aligned columns on stdout; the first ``left`` to the left, numbers to the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = stdout()
    with console.capture() as drawn:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


@contextmanager
def progress_bar(title: str, unit: str, quiet: bool = False) -> Iterator[Advance]:
    """A function ``(done, total)`` that draws a bar on a terminal's stderr and nothing elsewhere.

    The bar appears with the first call, so that nothing disturbs a download's own bars before.
    """
    console = stderr()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=quiet or not console.is_terminal,
    )
    task = bar.add_task(title, total=None)
    started = False

    def advance(done: int, total: int) -> None:
        nonlocal started
        if not started:
            bar.start()
            started = True
        bar.update(task, completed=done, total=total)

    try:
        yield advance
    finally:
        if started:
            bar.stop()


def human_bytes(n: int) -> str:
    """Bytes with three digits and a unit: 1234567 -> "1.23 MB"."""
    value = float(n)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.5 or unit == "TB":
            break
        value /= 1000
    return f"{n} B" if unit == "B" else f"{value:.3g} {unit}"
