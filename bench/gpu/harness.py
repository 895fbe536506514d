"""What the benches of bench/gpu share: the clock, contenders by turns, limits, and the report.

Contenders run by turns in one process, timed by the device's events; a ratio is the median of the
ratios of each round, a time the median of the rounds.  What is short is captured some times over as
one graph, so that launches cost what they cost in a decode step.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import bitnet_ext as bx
from bitnet_ext.gpu import device as devices
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.device import CudaDevice, Device

NO_PEER = 3  # exit status of a bench whose own figures stand, and of whose peers one is absent
HERE = Path(__file__).parent
Row = dict[str, Any]


LIMITS = Module("limits.cu", ["read_words"], folder=HERE)
_THREADS = 512


@dataclass(frozen=True)
class Turn:
    """A contender: ``run`` does ``amount`` times the work that is compared, ``rest`` the rest."""

    run: Callable[[], object]
    amount: float = 1.0
    rest: Turn | None = None

    def seconds(self, clock: Callable[[Callable[[], object]], float]) -> float:
        """Of the work that is compared."""
        own = clock(self.run) / self.amount
        return own if self.rest is None else own + self.rest.seconds(clock)


class Times:
    """Seconds of each contender in each round."""

    def __init__(self, rounds: list[dict[str, float]]) -> None:
        self._rounds = rounds

    def __contains__(self, name: str) -> bool:
        return name in self._rounds[0]

    def median(self, name: str) -> float:
        return statistics.median(found[name] for found in self._rounds)

    def ratio(self, name: str, below: str) -> float:
        return statistics.median(found[name] / found[below] for found in self._rounds)


class Clock:
    """Seconds of a device's work: by events on a card, by the wall elsewhere."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._cuda: Any = None
        if isinstance(device, CudaDevice):
            import cupy

            self._cuda = cupy.cuda

    def seconds(self, work: Callable[[], object]) -> float:
        """Of ``work`` on the current stream, launches included where they are the slower."""
        if self._cuda is None:
            return self.wall(work)
        start, end = self._cuda.Event(), self._cuda.Event()
        start.record()
        work()
        end.record()
        end.synchronize()
        return float(self._cuda.get_elapsed_time(start, end)) / 1e3

    def wall(self, work: Callable[[], object]) -> float:
        """What a caller on the host waits."""
        self._device.synchronize()
        start = time.perf_counter()
        work()
        self._device.synchronize()
        return time.perf_counter() - start


class Bench:
    """One run of a bench: the device, options, limits, rows and absent peers."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.name, self.options = name, options
        self.smoke: bool = options.smoke
        self.device = devices.cuda_device()
        self.clock = Clock(self.device)
        self.rows: list[Row] = []
        self.absent: dict[str, str] = {}  # peer: why
        self._limits: dict[str, Turn] = {}
        self._held: list[Any] = []

    def _buffers(self) -> list[Any]:
        """Two to read from and copy to, and a word; made for the first limit."""
        if not self._held:
            size = 1 << (14 if self.smoke else 30)
            self._held = [self.device.to_device(np.full(size // 4, i, np.uint32)) for i in (1, 2)]
            self._held.append(self.device.to_device(np.zeros(1, np.uint32)))
        return self._held

    # --- contenders -----------------------------------------------------------------------------

    def graph(self, work: Callable[[], object], count: int = 20, each: int = 1) -> Turn:
        """``work``, which neither allocates nor asks the host, ``count`` times as one graph.

        Args:
            each: how many times ``work`` does what is compared.
        """
        count = 2 if self.smoke else count
        work()  # compiles and loads

        def works() -> None:
            for _ in range(count):
                work()

        return Turn(self.device.capture(works), count * each)

    def read(self, nbytes: float) -> Turn:
        """Reading so many bytes of memory once."""
        words, _, word = self._buffers()
        args = [word, words, np.int64(words.nbytes // 16)]
        grid = (8 * self.device.processors,)
        turn = self._limit(
            "read", lambda: self.device.launch(LIMITS, "read_words", grid, (_THREADS,), args)
        )
        return Turn(turn.run, turn.amount * words.nbytes / nbytes)

    def copy(self, nbytes: float) -> Turn:
        """Copying inside the memory, so many bytes read and written together."""
        a, b, _ = self._buffers()

        def work() -> None:
            b[...] = a

        turn = self._limit("copy", work)
        return Turn(turn.run, turn.amount * 2 * a.nbytes / nbytes)

    def _limit(self, name: str, work: Callable[[], object]) -> Turn:
        if name not in self._limits:
            self._limits[name] = self.graph(work, 4)
        return self._limits[name]

    def by_turns(self, turns: dict[str, Turn], *, wall: bool = False) -> Times:
        """Each once untimed, then rounds of all.

        Args:
            wall: time what a caller on the host waits.
        """
        clock = self.clock.wall if wall else self.clock.seconds
        for turn in turns.values():
            turn.run()
        rounds = 2 if self.smoke else self.options.repeats
        return Times(
            [{name: turn.seconds(clock) for name, turn in turns.items()} for _ in range(rounds)]
        )

    def add(
        self, name: str, turns: dict[str, Turn], limit: str = "", *, wall: bool = False, **more: Any
    ) -> Row:
        """Measure "kernel", "limit" where there is one, and peers, all others; keep the row."""
        times = self.by_turns(turns, wall=wall)
        row: Row = {"name": name, **more, "us": 1e6 * times.median("kernel")}
        if "limit" in times:
            row |= {"limit": limit, "of_limit": times.ratio("limit", "kernel")}
        peers = [peer for peer in turns if peer not in ("kernel", "limit")]
        row["peer_us"] = {peer: 1e6 * times.median(peer) for peer in peers}
        row["over"] = {peer: times.ratio(peer, "kernel") for peer in peers}
        self.rows.append(row)
        return row

    # --- the report -----------------------------------------------------------------------------

    def rates(self) -> dict[str, float]:
        """Bytes a second of the limits in this process."""
        times = self.by_turns({"read": self.read(1.0), "copy": self.copy(1.0)})
        return {f"{name}_bytes_per_second": 1 / times.median(name) for name in ("read", "copy")}

    def finish(self, **more: Any) -> int:
        """Print the table and write the file, ``more`` in it; NO_PEER where a peer is absent."""
        machine, limits = self.machine(), self.rates()
        show(f"{self.name}: {machine['card']}", self.rows)
        if self.options.json:
            found = {
                "machine": machine,
                "limits": limits,
                "absent": self.absent,
                "results": self.rows,
                **more,
            }
            self.options.json.write_text(json.dumps(found, indent=1) + "\n")
        for peer, why in self.absent.items():
            print(f"nothing is claimed of {peer}: {why}")
        return NO_PEER if self.absent else 0

    def machine(self) -> dict[str, Any]:
        query = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return {
            "card": self.device.name,
            "capability": self.device.capability / 10,
            "driver": query.partition("\n")[0].strip(),
            "date": datetime.date.today().isoformat(),
            "commit": os.environ.get("COMMIT") or _commit(),
            "version": bx.__version__,
            "smoke": self.smoke,
        }


def options_of(
    text: str, arguments: Sequence[str] | None, *more: tuple[str, dict[str, Any]]
) -> argparse.Namespace:
    """The options that every bench has, and ``more``."""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write machine and results here")
    parser.add_argument("--repeats", type=int, default=9, help="rounds")
    parser.add_argument(
        "--smoke",
        action="store_true",
        help="tiny shapes: shows that everything runs; its times mean nothing",
    )
    for name, keywords in more:
        parser.add_argument(name, **keywords)
    return parser.parse_args(arguments)


def show(title: str, rows: list[Row]) -> None:
    """Name, shape, time, part of the limit and ratios to peers of each row."""
    table = Table(title=title, title_justify="left")
    for column in ("", "shape", "us", "of limit", "over"):
        table.add_column(column, justify="left" if column in ("", "shape", "over") else "right")
    known = {"name", "us", "limit", "of_limit", "peer_us", "over"}
    for row in rows:
        shape = ", ".join(f"{key} {_short(row[key])}" for key in row if key not in known)
        of_limit = f"{row['of_limit']:.0%} ({row['limit']})" if "of_limit" in row else ""
        over = ", ".join(f"{peer} {ratio:.2f}x" for peer, ratio in row.get("over", {}).items())
        us = f"{row['us']:,.1f}" if "us" in row else ""
        table.add_row(row["name"], shape, us, of_limit, over)
    Console(width=150).print(table)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    return _output("git", "-C", str(HERE), "rev-parse", "HEAD").strip()


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
