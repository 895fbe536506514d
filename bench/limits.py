"""The machine's limits, measured in the process and in the minute of the kernels beside them."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from turns import clock, settle

# The dot product each ISA's ternary kernels stand on.
PEAKS = {
    "avx2": "maddubs_ymm",
    "avxvnni": "vpdpbusd_ymm",
    "avxvnni_evex": "vpdpbusd_ymm",
    "avx512": "maddubs_zmm",
    "avx512vnni": "vpdpbusd_zmm",
    "amx_int8": "tdpbsud_tiles",
}
# The float multiply-add its attention, norms and vocabulary projection stand on.
WIDE = ("avx512", "avx512vnni", "amx_int8")
FMA_PEAKS = {isa: "fma_zmm" if isa in WIDE else "fma_ymm" for isa in PEAKS}


class Limits:
    """Peak multiply-adds and read bandwidth with a number of threads.  Needs g++ (or c++)."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._clock = clock(threads)
        # A core each: threads that just woke may share one, and a limit reads half.
        self._cpus = sorted(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(max(1, threads - 1))
        self._folder = tempfile.TemporaryDirectory()
        library = Path(self._folder.name) / "limits.so"
        source = Path(__file__).with_name("limits.cpp")
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
        self._library = ctypes.CDLL(str(library))
        for name in {*PEAKS.values(), *FMA_PEAKS.values(), "read_stream"}:
            function = getattr(self._library, name)
            function.restype = ctypes.c_int64
        self._library.read_stream.argtypes = [ctypes.c_void_p, ctypes.c_int64]

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds: of this thread's CPU where there is one thread, else on the wall."""
        start = self._clock()
        work()
        return self._clock() - start

    def peak(self, isa: str, rounds: int = 2_000_000) -> float | None:
        """Multiply-adds a second of the ISA's dot product in registers; None for scalar."""
        return self._registers(PEAKS, isa, rounds)

    def fma_peak(self, isa: str, rounds: int = 2_000_000) -> float | None:
        """Float32 multiply-adds a second in registers; None for scalar."""
        return self._registers(FMA_PEAKS, isa, rounds)

    def read(self, data: np.ndarray) -> float:
        """Bytes a second of reading ``data``, a contiguous part a thread."""
        part = data.nbytes // self.threads // 256 * 256 - 8192
        start = data.ctypes.data
        return self._rate(lambda i: self._library.read_stream(start + i * part, part))

    def _registers(self, peaks: dict[str, str], isa: str, rounds: int) -> float | None:
        if isa not in peaks:
            return None
        function = getattr(self._library, peaks[isa])
        return self._rate(lambda _: function(ctypes.c_int64(rounds)))

    def _rate(self, work: Callable[[int], int]) -> float:
        done = [0] * self.threads

        def run(i: int) -> None:
            if self.threads > 1:
                os.sched_setaffinity(0, {self._cpus[i % len(self._cpus)]})  # this thread's
            done[i] = work(i)

        def run_all() -> None:
            workers = [self._pool.submit(run, i) for i in range(1, self.threads)]
            run(0)
            for worker in workers:
                worker.result()

        settle()
        try:
            seconds = self.timed(run_all)
        finally:
            os.sched_setaffinity(0, self._cpus)  # the kernels' thread, too
        return sum(done) / seconds
