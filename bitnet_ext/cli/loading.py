"""From model options to a loaded model, with a progress bar."""

from __future__ import annotations

from time import perf_counter

import bitnet_ext as bx
from bitnet_ext.api import BitNetModel
from bitnet_ext.cli.options import ModelOptions, RunOptions
from bitnet_ext.cli.terminal import human_bytes, note, progress_bar
from bitnet_ext.gpu import device as devices

__all__ = ["load"]


def load(options: ModelOptions, run: RunOptions) -> BitNetModel:
    """The model; one line about it goes to stderr."""
    start = perf_counter()
    with progress_bar("loading", "layers", run.quiet) as advance:
        model = BitNetModel._load(
            options.model,
            options.source(),
            device=options.device,
            kv_dtype=options.kv_dtype,
            head=options.head,
            precision=options.precision,
            progress=advance,
        )
    c = model.config
    where = f"{bx.get_isa()}, {bx.get_num_threads()} threads"
    if model.device == "cuda":
        where = devices.cuda_device().name
    note(
        f"{options.model}: {c.model_type}, {c.num_layers} layers of {c.hidden_size}, "
        f"{human_bytes(bx.estimate_memory(c, 1, 1).weights)}, loaded in "
        f"{perf_counter() - start:.2f} s; {where}",
        run.quiet,
    )
    return model
