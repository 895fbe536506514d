"""CUDA kernels beside what the card's memory allows, and beside torch where it is installed.

Each kernel is captured some times over as one graph, so that launches cost what they cost in a
decode step; medians of several replays.  The limit is the bytes that must be read over the rate of
a copy measured in the same process.  Results go to bench/results with card, driver, date, commit.

    python bench/gpu/bench_kernels.py [--json FILE] [--smoke]

``--smoke`` takes tiny shapes: it shows that everything runs, and its times mean nothing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import bitnet_ext as bx
from bitnet_ext.gpu import device as devices
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.sample import Choice, DeviceSampler
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.gpu.topk import TopK
from bitnet_ext.model.load import RandomWeights, load_weights

INNER, REPEATS = 20, 15  # launches in a graph, replays


@dataclass(frozen=True)
class Result:
    """A kernel's time; the limit and the peer's time where there are such."""

    name: str
    seconds: float
    bytes: int = 0
    limit: float | None = None
    peer: float | None = None

    @property
    def row(self) -> list[str]:
        share = "" if self.limit is None else f"{self.limit / self.seconds:.0%}"
        ratio = "" if self.peer is None else f"{self.peer / self.seconds:.2f}x"
        return [self.name, f"{self.seconds * 1e6:.1f}", share, ratio]


def seconds(device: Device, work: Callable[[], None], inner: int = INNER) -> float:
    """Of one ``work``, which neither allocates nor copies from or to the host."""
    work()
    replay = device.capture(lambda: [work() for _ in range(inner)] and None)
    replay()
    device.synchronize()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        replay()
        device.synchronize()
        found.append((time.perf_counter() - start) / inner)
    return statistics.median(found)


def copy_rate(device: Device, size: int) -> float:
    """Bytes a second, read and written, of a copy inside the device's memory."""
    source = device.to_device(np.zeros(size, np.uint8))
    target = device.empty((size,), np.uint8)

    def work() -> None:
        target[...] = source

    return 2 * size / seconds(device, work, 4)


def torch_seconds(work: Callable[[], Any]) -> float:
    import torch

    work()
    torch.cuda.synchronize()
    found = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for _ in range(INNER):
            work()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / INNER)
    return statistics.median(found)


def torch_projection(rows: int, vocab: int, width: int) -> float | None:
    """torch's bf16 product of the same shape; None without torch on a device."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    x = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    table = torch.randn(vocab, width, device="cuda", dtype=torch.bfloat16)
    return torch_seconds(lambda: x @ table.T)


def projections(device: Device, rate: float, vocab: int, width: int) -> list[Result]:
    rng = np.random.default_rng(0)
    bits = rng.integers(0x3C00, 0x3F80, (vocab, width), np.uint16)
    codes = rng.integers(-127, 128, (vocab, width), np.int8)
    tables = {
        "bf16": DeviceTable.upload(device, bits, "bf16"),
        "int8": DeviceTable.upload(device, codes, "int8", np.ones(vocab, np.float32)),
    }
    found = []
    for dtype, table in tables.items():
        for rows in (1, 4, 16):
            x = device.to_device(rng.standard_normal((rows, width), np.float32))
            out = device.empty((rows, vocab), np.float32)
            size = table.nbytes + 4 * rows * (vocab + width)
            found.append(
                Result(
                    f"projection {dtype} M={rows}",
                    seconds(device, lambda x=x, t=table, o=out: project(device, x, t, None, o)),
                    size,
                    size / rate,
                    torch_projection(rows, vocab, width) if dtype == "bf16" else None,
                )
            )
    return found


def choices(device: Device, rate: float, vocab: int) -> list[Result]:
    host = np.random.default_rng(0).normal(0, 4, (1, vocab)).astype(np.float32)
    logits = device.to_device(host)
    positions, tokens = (device.to_device(np.zeros(1, np.int32)) for _ in range(2))
    kinds = {
        "greedy": Choice(greedy=True),
        "temperature": Choice(greedy=False),
        "top-k 50, top-p 0.9": Choice(greedy=False, top_k=50, top_p=0.9),
    }
    found = []
    for name, choice in kinds.items():
        sampler = DeviceSampler(device, 1, vocab, choice)
        took = seconds(device, lambda s=sampler: s.choose(logits, positions, tokens))
        found.append(Result(f"sample {name}", took, 4 * vocab, 4 * vocab / rate))
    finder = TopK(device, 1, vocab, 50)
    took = seconds(device, lambda: finder.find(logits))
    return [*found, Result("top-k 50", took, 4 * vocab, 4 * vocab / rate)]


def model_steps(rate: float, config: bx.BitNetConfig, prompt: int) -> list[Result]:
    """A decode step and a prefill of random weights, through the model."""
    gpu = devices.cuda_device()
    model = bx.BitNetModel(config, load_weights(RandomWeights(config)), "f16", "cuda")
    weights = bx.estimate_memory(config, 1, 1, device="cuda").weights
    found = []
    for batch in (1, 8):
        cache = model.new_cache(batch, min(256, config.max_position_embeddings))
        ids = gpu.to_device(np.zeros(batch, np.int32))
        out = gpu.empty((batch, config.vocab_size), np.float32)
        times = []
        for _ in range(50):
            gpu.synchronize()
            start = time.perf_counter()
            model.decode(ids, cache, out=out)
            gpu.synchronize()
            times.append(time.perf_counter() - start)
        name = f"decode step, batch {batch}"
        found.append(Result(name, statistics.median(times[5:]), weights, weights / rate))
    ids = np.zeros((1, prompt), np.int32)
    cache = model.new_cache(1, prompt)
    times = []
    for _ in range(4):
        cache.reset()
        start = time.perf_counter()
        model.prefill(ids, cache)
        gpu.synchronize()
        times.append(time.perf_counter() - start)
    return [*found, Result(f"prefill of {prompt}", min(times[1:]))]


def machine(device: Device) -> dict[str, str]:
    def output(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    query = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "card": device.name,
        "capability": f"{device.capability / 10}",
        "driver": query.splitlines()[0].strip(),
        "date": datetime.date.today().isoformat(),
        "commit": output("git", "rev-parse", "HEAD").strip(),
        "version": bx.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    device = devices.cuda_device()
    if options.smoke:
        vocab, width, size, config, prompt = 300, 48, 1 << 12, bx.BitNetConfig.tiny(), 9
    else:
        vocab, width, size, prompt = 128256, 2560, 1 << 30, 8192
        config = bx.BitNetConfig.bitnet_2b_4t()
        if config.max_position_embeddings < prompt:
            prompt = config.max_position_embeddings
    rate = copy_rate(device, size)
    results = [
        *projections(device, rate, vocab, width),
        *choices(device, rate, vocab),
        *model_steps(rate, config, prompt),
    ]
    print(f"{device.name}: copies at {rate / 1e12:.2f} TB/s")
    for row in [["kernel", "us", "of limit", "beside torch"], *(r.row for r in results)]:
        print(f"{row[0]:28} {row[1]:>10} {row[2]:>9} {row[3]:>13}")
    if options.json:
        found = {"machine": machine(device), "copy_bytes_per_second": rate}
        found["results"] = [asdict(result) for result in results]
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
