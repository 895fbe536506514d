"""Memory of the card beside what is estimated, and of attention with shared keys and values.

The peak is what CuPy's pool holds, from this process's first array on.

    PYTHONPATH=. python bench/gpu/bench_memory.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import Bench, options_of

import bitnet_ext as bx


def full_forward(bench: Bench, name: str, config: bx.BitNetConfig, batch: int, length: int) -> None:
    model = bx.BitNetModel.random(config, device="cuda")
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length))
    bx.reset_peak_memory("cuda")  # what loading held goes back
    logits = model.forward_full(ids)
    found = bx.memory_stats("cuda").peak
    assert logits.shape == (batch, length, config.vocab_size)
    estimate = bx.estimate_memory(config, batch, length, device="cuda").total
    bench.rows.append(
        {
            "name": f"forward_full {name}",
            "sequences": batch,
            "length": length,
            "mb": found / 1e6,
            "estimate_mb": estimate / 1e6,
            "of_estimate": found / estimate,
        }
    )


def shared_heads(bench: Bench, heads: int, length: int, dim: int) -> None:
    """Bytes beside q and the result: of keys and values for each head, and of shared ones."""
    peaks = {}
    for kv_heads in (heads, 1):
        rng = np.random.default_rng(0)
        shapes = [(1, n, length, dim) for n in (heads, kv_heads, kv_heads)]
        q, k, v = (bench.device.to_device(rng.standard_normal(s, np.float32)) for s in shapes)
        bx.attention(q, k, v, causal=True)
        gc.collect()
        bx.reset_peak_memory("cuda")
        before = bx.memory_stats("cuda").current
        out: Any = bx.attention(q, k, v, causal=True)
        peaks[kv_heads] = bx.memory_stats("cuda").peak - before - out.nbytes
        del q, k, v, out
    for kv_heads, found in peaks.items():
        bench.rows.append(
            {
                "name": "attention beside its arrays",
                "heads": heads,
                "kv_heads": kv_heads,
                "length": length,
                "mb": found / 1e6,
            }
        )


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("memory", options_of(__doc__ or "", arguments))
    if bench.smoke:
        full_forward(bench, "gpt2_medium", bx.BitNetConfig.tiny(), 2, 9)
        shared_heads(bench, 2, 20, 16)
    else:
        full_forward(bench, "gpt2_medium", bx.BitNetConfig.gpt2_medium(), 8, 1024)
        gc.collect()
        shared_heads(bench, 16, 4096, 128)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
