"""Ops on arrays of the host, on the CPU and by way of the card: the table of gpu/dispatch.py.

Measures what the table needs (the link, a call, the rates of CPU and card), then each op at several
sizes both ways, and says what ``device="auto"`` chooses with that table.  Results have the same
bits first.

    PYTHONPATH=. python bench/gpu/bench_dispatch.py [--json FILE] [--smoke]
    PYTHONPATH=. python bench/gpu/bench_dispatch.py --take FILE

``--take`` puts the table of a file of ``--json`` into the package; it needs no card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from harness import Bench, Turn, options_of

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.dispatch import Rates, Table

TABLE = Path(dispatch.__file__).with_name(dispatch.TABLE)
N, K = 13824, 2560  # gate and up of the 2B shape
ROWS, LENGTHS = (1, 16, 64, 256, 1024, 4096), (128, 512, 2048, 8192)
HEADS, DIM = 16, 128
MARGIN = 1.25  # of a measured table


@dataclass(frozen=True)
class Case:
    """An op at one size."""

    op: str
    name: str
    size: int
    arrays: list[Any]  # of the host
    call: Callable[..., Any]  # of arrays
    work: float
    nbytes: int  # copied there and back


class Cases:
    def __init__(self, smoke: bool) -> None:
        self.n, self.k = (40, 48) if smoke else (N, K)
        codes = np.random.default_rng(0).integers(-1, 2, (self.n, self.k), np.int8)
        self.weight = _core.PackedTernary.pack(codes, 0.02, bits="2")
        self.heads, self.dim = (2, 8) if smoke else (HEADS, DIM)

    def linear(self, rows: int) -> Case:
        x = np.random.default_rng(rows).standard_normal((rows, self.k), np.float32)

        def call(x: Any, **where: Any) -> Any:
            return bx.ternary_linear(x, self.weight, **where)

        nbytes = 4 * rows * (self.k + self.n)
        return Case("ternary", "ternary_linear", rows, [x], call, rows * self.n * self.k, nbytes)

    def attention(self, length: int) -> Case:
        rng = np.random.default_rng(length)
        arrays = [
            rng.standard_normal((1, self.heads, length, self.dim), np.float32) for _ in range(3)
        ]

        def call(*arrays: Any, **where: Any) -> Any:
            return bx.attention(*arrays, causal=True, **where)

        work = self.heads * length * length * self.dim  # half of two products
        nbytes = 4 * arrays[0].nbytes
        return Case("attention", "attention", length, arrays, call, work, nbytes)


def seconds(bench: Bench, work: Callable[[], object]) -> float:
    return bench.by_turns({"kernel": Turn(work)}, wall=True).median("kernel")


def link(bench: Bench) -> float:
    """Bytes a second of the slower way between host and card, of ordinary memory."""
    host = np.ones(1 << (12 if bench.smoke else 26), np.uint8)
    there = bench.device.to_device(host)
    ways = (lambda: bench.device.to_device(host), lambda: bench.device.to_host(there))
    return host.nbytes / max(seconds(bench, way) for way in ways)


def rates(bench: Bench, on_host: Case, on_device: Case) -> Rates:
    """Of an op's case for the CPU, and of one for the card, whose arrays are there already."""
    there = [bench.device.to_device(array) for array in on_device.arrays]
    host = seconds(bench, lambda: on_host.call(*on_host.arrays, device="cpu"))
    device = seconds(bench, lambda: on_device.call(*there))
    return Rates(on_host.work / host / bx.get_num_threads(), on_device.work / device)


def measured(bench: Bench, cases: Cases) -> Table:
    small = cases.linear(1)
    calls = {"kernel": Turn(lambda: small.call(*small.arrays, device="cuda"))}
    rows, lengths = ((3, 5), (9, 20)) if bench.smoke else ((512, 8192), (1024, 8192))
    machine = bench.machine() | {"cpu": _core.cpu_brand(), "threads": bx.get_num_threads()}
    return Table(
        measured=machine,
        call_seconds=bench.by_turns(calls, wall=True).median("kernel"),
        link_bytes_per_second=link(bench),
        margin=MARGIN,
        mask_elements=dispatch.table().mask_elements,
        ops={
            "ternary": rates(bench, *map(cases.linear, rows)),
            "attention": rates(bench, *map(cases.attention, lengths)),
        },
    )


def compare(bench: Bench, table: Table, case: Case) -> None:
    """The op both ways, and what is chosen by the table."""
    on_host, by_way = (
        lambda: case.call(*case.arrays, device="cpu"),
        lambda: case.call(*case.arrays, device="cuda"),
    )
    np.testing.assert_array_equal(by_way(), on_host())
    turns = {"kernel": Turn(by_way), "this CPU": Turn(on_host)}
    row = bench.add(case.name, turns, wall=True, size=case.size)
    chosen = dispatch.pays(table, case.op, case.work, case.nbytes, bx.get_num_threads())
    row["auto"] = "cuda" if chosen else "cpu"


def main(arguments: Sequence[str] | None = None) -> int:
    take = ("--take", {"type": Path, "help": "write the table of this file into the package"})
    options = options_of(__doc__ or "", arguments, take)
    if options.take is not None:
        table = Table.of(json.loads(options.take.read_text())["table"])
        TABLE.write_text(json.dumps(asdict(table), indent=1) + "\n")
        return 0
    bench = Bench("host arrays", options)
    cases = Cases(bench.smoke)
    table = measured(bench, cases)
    for rows in (1, 9) if bench.smoke else ROWS:
        compare(bench, table, cases.linear(rows))
    for length in (9,) if bench.smoke else LENGTHS:
        compare(bench, table, cases.attention(length))
    return bench.finish(table=asdict(table))


if __name__ == "__main__":
    sys.exit(main())
