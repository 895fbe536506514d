"""torch beside our kernels: on the card, or on the CPU where the device is an emulated one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import numpy.typing as npt
from harness import Bench, Turn

from bitnet_ext.gpu.device import CudaDevice

SQUARE = 8192  # rows and columns of the products that give the matrix units' rates
BACKENDS = {
    "flash": "FLASH_ATTENTION",
    "cudnn": "CUDNN_ATTENTION",
    "efficient": "EFFICIENT_ATTENTION",
}


class Torch:
    """torch on the bench's device."""

    def __init__(self, bench: Bench, torch: Any) -> None:
        self.torch = torch
        self.bench = bench
        self.place = "cuda" if isinstance(bench.device, CudaDevice) else "cpu"
        torch.set_grad_enabled(False)
        torch.backends.cuda.matmul.allow_tf32 = False  # float32 rows are float32
        self._rates: dict[str, Turn] = {}

    def tensor(self, array: npt.NDArray[Any]) -> Any:
        host = np.ascontiguousarray(array)
        if host.dtype.name == "bfloat16":  # which from_numpy does not know
            return (
                self.torch.from_numpy(host.view(np.int16)).view(self.torch.bfloat16).to(self.place)
            )
        return self.torch.from_numpy(host).to(self.place)

    def randn(self, *shape: int, dtype: str = "bfloat16") -> Any:
        return self.torch.randn(*shape, device=self.place, dtype=getattr(self.torch, dtype))

    def graph(self, work: Callable[[], object], count: int = 20, each: int = 1) -> Turn:
        """As Bench.graph."""
        torch, count = self.torch, 2 if self.bench.smoke else count

        def works() -> None:
            for _ in range(count):
                work()

        if self.place == "cpu":
            return Turn(works, count * each)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            works()
        return Turn(graph.replay, count * each)

    def backend(self, name: str) -> AbstractContextManager[None]:
        """Attention by that backend alone."""
        from torch.nn.attention import SDPBackend, sdpa_kernel

        found: AbstractContextManager[None] = sdpa_kernel([getattr(SDPBackend, BACKENDS[name])])
        return found

    # --- rates of the matrix units --------------------------------------------------------------

    def int8_rate(self, macs: float) -> Turn:
        """So many int8 multiply-adds at the rate of the product that ``_int_mm`` does fastest."""
        return self._rate("int8", macs, self._best_int8)

    def half_rate(self, macs: float) -> Turn:
        """So many float16 multiply-adds at the rate of a large product."""
        return self._rate("float16", macs, lambda: self._matmul("float16"))

    def float_rate(self, macs: float) -> Turn:
        """So many float32 multiply-adds at the rate of a large product."""
        return self._rate("float32", macs, lambda: self._matmul("float32"))

    def _rate(self, name: str, macs: float, make: Callable[[], Turn]) -> Turn:
        """``make`` gives a turn whose amount is its multiply-adds."""
        if name not in self._rates:
            self._rates[name] = make()
        turn = self._rates[name]
        return Turn(turn.run, turn.amount / macs)

    def _matmul(self, dtype: str) -> Turn:
        n = 32 if self.bench.smoke else SQUARE
        a, b = self.randn(n, n, dtype=dtype), self.randn(n, n, dtype=dtype)
        turn = self.graph(lambda: a @ b, 2)
        return Turn(turn.run, turn.amount * n**3)

    def _best_int8(self) -> Turn:
        best, found = 0.0, None
        for m, n, k in [(32, 32, 32)] if self.bench.smoke else INT8_SHAPES:
            a, b = (self.int8(rows, k) for rows in (m, n))
            turn = self.graph(lambda a=a, b=b: self.torch._int_mm(a, b.t()), 2)
            turn = Turn(turn.run, turn.amount * m * n * k)
            turn.run()
            rate = turn.amount / self.bench.clock.seconds(turn.run)
            if rate > best:
                best, found = rate, turn
        assert found is not None
        return found

    def int8(self, rows: int, columns: int) -> Any:
        return self.torch.randint(
            -127, 128, (rows, columns), device=self.place, dtype=self.torch.int8
        )


# (m, n, k) of products among which the fastest gives the int8 rate.
INT8_SHAPES = [(SQUARE, SQUARE, SQUARE), (4096, 4096, 4096), (SQUARE, 13824, 2560)]


def find_torch(bench: Bench) -> Torch | None:
    """torch, or None with the reason noted: then nothing is claimed of it."""
    try:
        import torch
    except ImportError as error:
        bench.absent["torch"] = str(error)
        return None
    if isinstance(bench.device, CudaDevice) and not torch.cuda.is_available():
        bench.absent["torch"] = "it sees no CUDA device"
        return None
    return Torch(bench, torch)
