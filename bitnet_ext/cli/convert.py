"""``bitnet-ext convert``: a checkpoint in another form."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Annotated, Literal

import typer

from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.failures import UsageError
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, command
from bitnet_ext.cli.terminal import human_bytes, note, progress_bar

__all__ = ["convert"]

Form = Literal["safetensors", "tq1_0", "tq2_0", "i2_s"]


@command
def convert(
    model: ModelOptions,
    run: RunOptions,
    output: Annotated[
        Path, typer.Argument(help="A new directory for safetensors, a new .gguf file otherwise.")
    ],
    to: Annotated[
        Form | None,
        typer.Option("--to", help="Form to write. [default: tq2_0 for a .gguf, else safetensors]"),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a model as packed safetensors or as a TQ1_0, TQ2_0 or I2_S .gguf file.

    `bitnet-ext convert --model demo demo.gguf --to tq2_0`
    """
    is_gguf = output.suffix == ".gguf"
    form: Form = to or ("tq2_0" if is_gguf else "safetensors")
    if is_gguf == (form == "safetensors"):
        raise UsageError(
            f"output: found {output} for {form}, wanted a name "
            + ("without .gguf" if is_gguf else "that ends in .gguf")
        )
    if output.exists() and not force:
        raise UsageError(f"output: {output} exists, wanted a new name, or --force to replace it")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output: found no directory {output.parent}, wanted one to write to")
    loaded = load(model, run)
    start = perf_counter()
    _write(loaded, output, form, run)
    files = [output] if output.is_file() else sorted(output.iterdir())
    size = human_bytes(sum(file.stat().st_size for file in files))
    note(f"{output}: {form}, {size} in {perf_counter() - start:.2f} s", run.quiet)


def _write(model: BitNetModel, output: Path, form: Form, run: RunOptions) -> None:
    from bitnet_ext.checkpoint import save_gguf

    with progress_bar("writing", "tensors", run.quiet) as advance:
        if form == "safetensors":
            model.save_pretrained(output, progress=advance)
        else:
            weights = model._engine.weights
            save_gguf(output, model.config, weights, model._checkpoint, form, progress=advance)
