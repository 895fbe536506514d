"""bx.attention beside torch's scaled_dot_product_attention, float32.

Self, cross, GQA, windowed and one-query (decode) attention; int8 scores beside torch's float32.
Both answers are checked first, some rows against float64.  Then they run by turns in this process;
medians; only ratios mean something on a shared machine.  With one thread the clock is that of the
thread, which neighbours do not slow.  Without torch there is nothing to compare: exit status 3.

    python bench/bench_attention.py [--threads 1 2] [--lengths 128 512 2048] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from peers import NO_PEER
from turns import by_turns

import bitnet_ext as bx
from bitnet_ext import _core

try:
    import torch
    import torch.nn.functional as F
except ImportError:
    print("bench_attention needs torch, the peer it is measured beside", file=sys.stderr)
    sys.exit(NO_PEER)


@dataclass(frozen=True)
class Case:
    """One shape and pattern; ``window`` keys before a row's own, causal, when not None."""

    name: str
    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    dim: int
    causal: bool = False
    window: int | None = None
    precision: str = "f32"

    def seen(self, row: int) -> slice:
        low = 0 if self.window is None else max(0, row - self.window)
        return slice(low, row + 1 if self.causal else self.k_len)

    @property
    def products(self) -> int:
        """Multiply-adds of the visible scores and their values."""
        rows = (self.seen(i).indices(self.k_len) for i in range(self.q_len))
        return 2 * self.dim * self.heads * sum(stop - start for start, stop, _ in rows)


def cases(length: int, dim: int) -> list[Case]:
    heads = 16 if length <= 4096 else 4  # all 16 of 16K keys would take a minute each
    shared = max(1, heads // 4)
    shape = (length, length, dim)
    found = [
        Case("self", heads, heads, *shape),
        Case("self int8", heads, heads, *shape, precision="int8"),
        Case("self causal", heads, heads, *shape, causal=True),
        Case("self causal int8", heads, heads, *shape, causal=True, precision="int8"),
        Case("cross", heads, heads, 128, length, dim),
        Case("GQA, 4 a kv head, causal", heads, shared, *shape, causal=True),
        Case("decode", heads, heads, 1, length, dim),
        Case("decode int8", heads, heads, 1, length, dim, precision="int8"),
        Case("decode GQA, 4 a kv head", heads, shared, 1, length, dim),
    ]
    if 512 <= length <= 4096:  # torch wants the mask as a tensor
        found += [
            Case(f"window T/{part}", heads, heads, *shape, True, length // part) for part in (2, 8)
        ]
    return found


def runs(case: Case, seed: int = 0) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(ours, torch's), checked."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((1, case.heads, case.q_len, case.dim), np.float32)
    k, v = (
        rng.standard_normal((1, case.kv_heads, case.k_len, case.dim), np.float32) for _ in range(2)
    )
    window = None if case.window is None else (case.window, 0)

    def ours() -> np.ndarray:
        options = {"causal": case.causal, "window": window, "precision": case.precision}
        return bx.attention(q, k, v, **options, device="cpu")

    tensors = [torch.from_numpy(x) for x in (q, k, v)]
    mask = None
    if window is not None:
        rows, keys = torch.arange(case.q_len)[:, None], torch.arange(case.k_len)
        mask = (keys <= rows) & (keys >= rows - case.window)

    def theirs() -> torch.Tensor:
        return F.scaled_dot_product_attention(
            *tensors,
            attn_mask=mask,
            is_causal=case.causal and mask is None,
            enable_gqa=case.kv_heads != case.heads,
        )

    check(case, q, k, v, ours(), theirs().numpy())
    return ours, theirs


def check(case: Case, q: Any, k: Any, v: Any, ours: np.ndarray, theirs: np.ndarray) -> None:
    """Some rows of both against float64."""
    rng = np.random.default_rng(1)
    near = 0.05 if case.precision == "int8" else 1e-5
    for head, row in zip(
        rng.integers(0, case.heads, 8), rng.integers(0, case.q_len, 8), strict=True
    ):
        kv, keys = head * case.kv_heads // case.heads, case.seen(row)
        s = k[0, kv, keys].astype(np.float64) @ q[0, head, row] / np.sqrt(case.dim)
        p = np.exp(s - s.max())
        wanted = p @ v[0, kv, keys].astype(np.float64) / p.sum()
        np.testing.assert_allclose(ours[0, head, row], wanted, atol=near)
        np.testing.assert_allclose(theirs[0, head, row], wanted, atol=1e-5)


def measure(case: Case, repeats: int) -> dict[str, Any]:
    ours, theirs = runs(case)
    seconds = by_turns({"ours": ours, "theirs": theirs}, repeats, bx.get_num_threads())
    pairs = list(zip(seconds["ours"], seconds["theirs"], strict=True))
    own, peer = (statistics.median(found) for found in seconds.values())
    row = {
        **vars(case),
        "threads": bx.get_num_threads(),
        "ms": own * 1e3,
        "torch_ms": peer * 1e3,
        "ratio": statistics.median(theirs / ours for ours, theirs in pairs),
    }
    row |= {
        "gflops": 2 * case.products / own / 1e9,
        "best_ratio": min(seconds["theirs"]) / min(seconds["ours"]),
    }
    print(
        f"{case.name:24} {row['threads']} threads T={case.k_len:<6} D={case.dim:<4}"
        f" {row['ms']:9.2f} ms"
        f"  {row['gflops']:6.1f} GFLOP/s   torch {row['torch_ms']:9.2f} ms"
        f"   {row['ratio']:5.2f}x (best {row['best_ratio']:.2f}x)",
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, bx.get_num_threads()])
    parser.add_argument("--lengths", type=int, nargs="*", default=[128, 512, 2048, 4096, 16384])
    parser.add_argument("--dims", type=int, nargs="*", default=[64, 128])
    parser.add_argument("--cases", nargs="*", help="names to run; default all")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="write machine and results here")
    options = parser.parse_args()
    bx.set_isa(options.isa)
    found = []
    for threads in dict.fromkeys(options.threads):
        bx.set_num_threads(threads)
        torch.set_num_threads(threads)
        found += [
            measure(case, options.repeats)
            for dim in options.dims
            for length in options.lengths
            for case in cases(length, dim)
            if not options.cases or case.name in options.cases
        ]
    if options.json:
        machine = {
            "cpu": _core.cpu_brand(),
            "isa": bx.get_isa(),
            "torch": torch.__version__,
            "version": bx.__version__,
        }
        with open(options.json, "w") as file:
            json.dump({"machine": machine, "results": found}, file, indent=1)


if __name__ == "__main__":
    main()
