"""Works timed by turns in one process: all of them meet every minute of a shared machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

SECONDS = 0.02  # of a turn, at least
PATIENCE = 1.0  # seconds in which other threads may fall asleep

Clock = Callable[[], float]


def clock(threads: int) -> Clock:
    """The thread's own where it is the only one, which neighbours do not slow; else the wall's."""
    return time.thread_time if threads == 1 else time.perf_counter


def settle() -> None:
    """Waits until the other threads of this process sleep.

    A pool spins on for up to milliseconds after its last job, on a core that the next turn needs.
    """
    own, end = str(threading.get_native_id()), time.perf_counter() + PATIENCE
    others = [task for task in Path("/proc/self/task").iterdir() if task.name != own]
    while time.perf_counter() < end and any(map(running, others)):
        time.sleep(0.001)


def running(task: Path) -> bool:
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0] == "R"
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return False


def turn(work: Callable[[], Any], now: Clock) -> float:
    """Seconds of a call, of as many as fill a turn; the first of short ones wake their threads."""
    settle()
    count = 1
    while (taken := timed(work, count, now)) < SECONDS:
        count *= 2
    return taken / count


def timed(work: Callable[[], Any], count: int, now: Clock) -> float:
    start = now()
    for _ in range(count):
        work()
    return now() - start


def by_turns(
    works: Mapping[str, Callable[[], Any]], repeats: int, threads: int
) -> dict[str, list[float]]:
    """Seconds of a call of each work, turn by turn."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(turn(work, clock(threads)))
    return found
