"""``bitnet-ext score``: how well a model predicts texts."""

from __future__ import annotations

import math
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer

from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.failures import UsageError
from bitnet_ext.cli.inputs import read_file, read_stdin
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, command
from bitnet_ext.cli.terminal import note, print_json, print_table, progress_bar

__all__ = ["score"]


@command
def score(
    model: ModelOptions,
    run: RunOptions,
    files: Annotated[
        list[Path] | None, typer.Argument(help="UTF-8 text files; `-` or none: standard input.")
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens that a window moves on in texts over the context."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a file.")] = False,
) -> None:
    """Bits per byte and perplexity of text files."""
    paths = files or [Path("-")]
    if paths.count(Path("-")) > 1:
        raise UsageError("files: found - twice, wanted it once: standard input is read whole")
    texts = [
        ("standard input", read_stdin()) if path == Path("-") else (str(path), read_file(path))
        for path in paths
    ]
    for name, text in texts:
        if not text:
            raise UsageError(f"{name}: found no text, wanted at least one character")
    loaded = load(model, run)
    start = perf_counter()
    scored = []
    with progress_bar("scoring", "files", run.quiet) as advance:
        for i, (name, text) in enumerate(texts):
            scored.append(_score(loaded, name, text, stride))
            advance(i + 1, len(texts))
    tokens = sum(row["tokens"] for row in scored)
    seconds = perf_counter() - start
    if json:
        for row in scored:
            print_json(row)
    else:
        _print(scored)
    note(f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s", run.quiet)


def _score(model: BitNetModel, name: str, text: str, stride: int | None) -> dict[str, Any]:
    found: Any = model.score(text, stride=stride)
    return {
        "file": name,
        "bytes": len(text.encode()),
        "tokens": int(found.num_tokens),
        "log_probability": float(found.total),
        "bits_per_byte": float(found.bits_per_byte),
        "perplexity": float(found.perplexity),
        "greedy_tokens": int(sum(found.is_greedy)),
    }


def _print(scored: list[dict[str, Any]]) -> None:
    rows = [*scored, _total(scored)] if len(scored) > 1 else scored
    print_table(
        ["file", "bytes", "tokens", "bits/byte", "perplexity", "greedy"],
        [
            [
                row["file"],
                str(row["bytes"]),
                str(row["tokens"]),
                f"{row['bits_per_byte']:.4f}",
                f"{row['perplexity']:.3f}",
                f"{row['greedy_tokens'] / max(row['tokens'], 1):.1%}",
            ]
            for row in rows
        ],
    )


def _total(scored: list[dict[str, Any]]) -> dict[str, Any]:
    """All files as one text: sums, and the ratios of the sums."""
    names = ("bytes", "tokens", "log_probability", "greedy_tokens")
    total: dict[str, Any] = {name: sum(row[name] for row in scored) for name in names}
    total["file"] = "total"
    total["bits_per_byte"] = -total["log_probability"] / math.log(2) / total["bytes"]
    total["perplexity"] = math.exp(-total["log_probability"] / max(total["tokens"], 1))
    return total
