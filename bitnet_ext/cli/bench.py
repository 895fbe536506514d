"""``bitnet-ext bench``: tokens per second of the ways through a model."""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Annotated, Any, Literal

import numpy as np
import typer

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.api import BitNetModel, place_of
from bitnet_ext.cli.failures import UsageError
from bitnet_ext.cli.loading import load
from bitnet_ext.cli.options import ModelOptions, RunOptions, command
from bitnet_ext.cli.terminal import note, print_json, print_table, progress_bar
from bitnet_ext.gpu import device as devices
from bitnet_ext.model.load import RandomWeights, load_weights

__all__ = ["bench"]


@command
def bench(
    model: ModelOptions,
    run: RunOptions,
    preset: Annotated[
        Literal["bitnet_2b_4t", "gpt2_small", "gpt2_medium", "tiny"] | None,
        typer.Option(help="Random weights of this shape instead of a model."),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option("--prompt-tokens", min=1, help="Length of prefill and forward_full.")
    ] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", min=1, help="Steps of decode.")] = 64,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Sequences at a time.")
    ] = 1,
    repeats: Annotated[int, typer.Option("--repeats", "-r", min=1, help="Timed runs.")] = 3,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Tokens per second of prefill, decode, greedy and forward_full: the median of repeats.

    decode computes every logit of a step; greedy the largest alone, as `generate` does at
    temperature 0. Ids are random, so that any shape can run; one untimed run goes before each
    measurement.
    """
    loaded = _random(preset, model, run) if preset is not None else load(model, run)
    context = loaded.config.max_position_embeddings
    if max(prompt_tokens, new_tokens) > context:
        raise UsageError(
            f"--prompt-tokens, --new-tokens: found {prompt_tokens}, {new_tokens}, wanted at most "
            f"the model's context of {context}"
        )
    results = []
    tests = _tests(loaded, batch_size, prompt_tokens, new_tokens)
    steps = len(tests) * (repeats + 1)
    with progress_bar("measuring", "runs", run.quiet) as advance:
        for i, (name, tokens, work) in enumerate(tests):
            advance(i * (repeats + 1), steps)
            work()
            _wait(loaded)
            seconds = []
            for k in range(repeats):
                advance(i * (repeats + 1) + k + 1, steps)
                start = perf_counter()
                work()
                _wait(loaded)
                seconds.append(perf_counter() - start)
            results.append(_result(name, tokens, batch_size, seconds))
    machine: dict[str, Any] = {
        "version": bx.__version__,
        "cpu": _core.cpu_brand(),
        "isa": bx.get_isa(),
        "threads": bx.get_num_threads(),
    }
    if loaded.device == "cuda":
        machine["cuda"] = devices.cuda_device().name
    if json:
        name = preset if preset is not None else model.model
        print_json({"model": name, "machine": machine, "results": results})
        return
    where = f"{machine['cpu']}, {machine['isa']}, {machine['threads']} threads"
    note(machine.get("cuda", where), run.quiet)
    _print(results)


def _random(preset: str, options: ModelOptions, run: RunOptions) -> BitNetModel:
    config = getattr(bx.BitNetConfig, preset)()
    with progress_bar("drawing weights", "layers", run.quiet) as advance:
        weights = load_weights(RandomWeights(config), options.head, advance)
    note(f"{preset}: random weights", run.quiet)
    place = place_of(options.device)
    return BitNetModel(config, weights, options.kv_dtype, place, options.precision)


def _wait(model: BitNetModel) -> None:
    """Until the device has done what was asked of it."""
    if model.device == "cuda":
        devices.cuda_device().synchronize()


def _tests(
    model: BitNetModel, batch: int, prompt: int, new: int
) -> list[tuple[str, int, Callable[[], Any]]]:
    """(name, tokens of a run, the run) for each way through the model."""
    vocab = model.config.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (batch, max(prompt, new)), np.int32)
    tokens: list[Any] = [np.ascontiguousarray(column) for column in ids.T]
    if model.device == "cuda":
        tokens = [devices.cuda_device().to_device(column) for column in tokens]
    cache = model.new_cache(batch, max(prompt, new))
    logits = model._engine.empty((batch, vocab))

    def prefill() -> None:
        cache.reset()
        model.prefill(ids[:, :prompt], cache, out=logits)

    def decode() -> None:
        cache.reset()
        for step in range(new):
            model.decode(tokens[step], cache, out=logits)

    def greedy() -> None:
        cache.reset()
        for step in range(new):
            model.decode_topk(ids[:, step], cache, 1)

    def full() -> None:
        model.forward_full(ids[:, :prompt])

    return [
        ("prefill", batch * prompt, prefill),
        ("decode", batch * new, decode),
        ("greedy", batch * new, greedy),
        ("forward_full", batch * prompt, full),
    ]


def _result(name: str, tokens: int, batch: int, seconds: list[float]) -> dict[str, Any]:
    return {
        "test": name,
        "tokens": tokens,
        "batch_size": batch,
        "seconds": seconds,
        "tokens_per_second": tokens / median(seconds),
    }


def _print(results: list[dict[str, Any]]) -> None:
    def rate(row: dict[str, Any], seconds: float) -> str:
        return f"{row['tokens'] / seconds:.1f}"

    print_table(
        ["test", "batch", "tokens", "tokens/s", "slowest", "fastest"],
        [
            [
                row["test"],
                str(row["batch_size"]),
                str(row["tokens"]),
                rate(row, median(row["seconds"])),
                rate(row, max(row["seconds"])),
                rate(row, min(row["seconds"])),
            ]
            for row in results
        ],
    )
