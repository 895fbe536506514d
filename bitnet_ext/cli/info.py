"""``bitnet-ext info``: the machine and a checkpoint, enough for a bug report."""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.cli.options import ModelOptions, RunOptions, command
from bitnet_ext.cli.terminal import human_bytes, print_json, print_table, stdout
from bitnet_ext.errors import DeviceUnavailableError
from bitnet_ext.gpu import device as devices

if TYPE_CHECKING:
    from bitnet_ext.checkpoint import Checkpoint

__all__ = ["info"]

_PACKAGES = ("numpy", "tokenizers", "huggingface_hub", "jinja2", "typer")
_VARIABLES = ("BITNET_ISA", "BITNET_NUM_THREADS", "BITNET_MEMORY_LIMIT", "OMP_NUM_THREADS")


@command
def info(
    model: ModelOptions,
    run: RunOptions,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor, not only a count by type.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", min=1, help="Sequences of the memory estimate.")
    ] = 1,
    seq_len: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of the memory estimate. [default: 2048 or the context]"),
    ] = None,
    warm: Annotated[
        bool, typer.Option("--warm", help="Compile every CUDA kernel ahead of its first use.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """CPU, kernels, threads, memory estimate and tensors: what a bug report needs."""
    from bitnet_ext.checkpoint import open_checkpoint

    machine = _machine()
    if warm:
        machine["cuda_kernels"] = devices.cuda_device().warm()
    if not json:
        _print_pairs(machine)
    checkpoint = open_checkpoint(model.model, **model.source())
    length = seq_len or min(2048, checkpoint.config.max_position_embeddings)
    place = "cpu" if model.device == "auto" else model.device
    found = _model(checkpoint, batch_size, length, model.kv_dtype, place)
    listed = checkpoint.tensors()
    if json:
        found["tensors"] = [
            {"name": name, "type": kind, "shape": list(shape)} for name, kind, shape in listed
        ]
        print_json({"machine": machine, "model": found})
        return
    estimates = found.pop("memory_estimate")
    config = found.pop("config")
    _title("model")
    _print_pairs(found)
    _title("configuration")
    _print_pairs({k: v for k, v in config.items() if v is not None})
    _title(f"memory estimate, batch {batch_size}, {length} tokens, kv {model.kv_dtype}")
    _print_estimates(estimates)
    _title("tensors")
    _print_tensors(listed, tensors)


def _machine() -> dict[str, Any]:
    stats = bx.memory_stats()
    return {
        "bitnet_ext": bx.__version__,
        "python": f"{platform.python_version()} ({platform.python_implementation()})",
        **{name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "libc": " ".join(platform.libc_ver()),
        "cpu": _core.cpu_brand(),
        "usable_cpus": len(os.sched_getaffinity(0)),
        "threads": bx.get_num_threads(),
        "isa": bx.get_isa(),
        "isa_needs": _core.isa_description(bx.get_isa()),
        "available_isas": bx.available_isas(),
        "kernels": {name: row["current"] for name, row in bx.dispatch_info().items()},
        "environment": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "cuda": _cuda(),
        "memory_total": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "memory_available": _available_memory(),
        "memory_limit": stats.limit,
    }


def _cuda() -> str:
    """The current CUDA device, or why there is none."""
    try:
        device = devices.cuda_device()
    except DeviceUnavailableError as error:
        return str(error)
    return f"{device.name}, sm_{device.capability}, {device.processors} multiprocessors"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _available_memory() -> int | None:
    """MemAvailable of /proc/meminfo in bytes; None where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(kilobytes[0]) if kilobytes else None


def _model(
    checkpoint: Checkpoint, batch: int, length: int, kv_dtype: Any, device: str
) -> dict[str, Any]:
    modes: tuple[Any, ...] = ("full", "prefill", "decode")
    estimates = {
        mode: bx.estimate_memory(checkpoint.config, batch, length, mode, kv_dtype, device)
        for mode in modes
    }
    return {
        "path": str(checkpoint.path),
        "format": checkpoint.format,
        "tokenizer_files": sorted(checkpoint.tokenizer_files()),
        "config": asdict(checkpoint.config),
        "generation_config": checkpoint.generation_config,
        "memory_estimate": {
            mode: asdict(estimate) | {"total": estimate.total}
            for mode, estimate in estimates.items()
        },
    }


def _title(text: str) -> None:
    stdout().print(f"\n{text}", style="bold")


def _print_pairs(pairs: dict[str, Any]) -> None:
    width = max(len(name) for name in pairs)
    for name, value in pairs.items():
        stdout().print(f"{name:{width}}  {_shown(name, value)}", soft_wrap=True)


def _shown(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "none set"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    if name.startswith("memory_"):
        return "none" if value is None else human_bytes(value)
    return str(value)


def _print_estimates(estimates: dict[str, dict[str, int]]) -> None:
    names = ["weights", "kv_cache", "activations", "output", "total"]
    rows = [[mode, *(human_bytes(row[n]) for n in names)] for mode, row in estimates.items()]
    print_table(["mode", *names], rows)


def _print_tensors(listed: list[tuple[str, str, tuple[int, ...]]], every: bool) -> None:
    if every:
        rows = [[name, kind, " x ".join(map(str, shape))] for name, kind, shape in listed]
        print_table(["name", "type", "shape"], rows, left=3)
        return
    kinds = Counter(kind for _, kind, _ in listed)
    print_table(["type", "tensors"], [[kind, str(count)] for kind, count in kinds.items()])
