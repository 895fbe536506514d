"""Multi-head attention on the card, forward and with its gradients, in float32, launches included.

Self-attention without a mask; "forward" with ``out``, which allocates nothing.  The limit is a
large float32 torch product at the multiply-adds that are needed; with gradients three times those
of "forward", and q, k, v and the scores again.  Peer: torch's linear layers around
scaled_dot_product_attention in float32, and its autograd.  Bits are compared with the CPU's where
the shape is small.

    PYTHONPATH=. python bench/gpu/bench_multi_head.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import Torch, find_torch

import bitnet_ext as bx

SHAPES = [(1, 8192, 1024, 16), (8, 1024, 1024, 16), (1024, 16, 192, 6)]  # B, S, E, heads
SMOKE = [(2, 20, 32, 4)]
CHECKED = 1 << 24  # multiply-adds that the CPU does in no time


def module(embed: int, heads: int) -> tuple[bx.MultiHeadAttention, dict[str, Any]]:
    rng = np.random.default_rng(embed)
    shape = (heads, embed // heads, embed)
    names = ("w_q", "w_k", "w_v", "w_out")
    state = {n: rng.standard_normal(shape, np.float32) / np.float32(embed**0.5) for n in names}
    mha = bx.MultiHeadAttention(embed, heads)
    mha.load_state_dict(state)
    return mha, state


def check(bench: Bench, name: str, found: Any, wanted: Any) -> None:
    if not np.array_equal(bench.device.to_host(found), wanted):
        raise SystemExit(f"{name}: found other bits than the CPU's")


def torch_calls(
    torch: Torch, state: dict[str, Any], x: Any, heads: int
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Forward, and forward with backward: autograd has no backward alone that runs twice."""
    module = torch.torch
    batch, rows, embed = x.shape
    flat = {n: torch.tensor(w.reshape(embed, embed)) for n, w in state.items()}
    flat["w_out"] = flat["w_out"].t().contiguous()
    source = torch.tensor(x)

    def forward() -> Any:
        linear = module.nn.functional.linear
        q, k, v = (
            linear(source, flat[n]).view(batch, rows, heads, -1).transpose(1, 2)
            for n in ("w_q", "w_k", "w_v")
        )
        y = module.nn.functional.scaled_dot_product_attention(q, k, v)
        return linear(y.transpose(1, 2).reshape(batch, rows, embed), flat["w_out"])

    def both() -> None:
        leaves = [source, *flat.values()]
        with module.enable_grad():
            for leaf in leaves:
                leaf.requires_grad_(True)
            y = forward()
            module.autograd.grad(y, leaves, module.ones_like(y))
        for leaf in leaves:
            leaf.requires_grad_(False)

    return forward, both


def measure(bench: Bench, torch: Torch | None, shape: tuple[int, int, int, int]) -> None:
    batch, rows, embed, heads = shape
    mha, state = module(embed, heads)
    host = np.random.default_rng(rows).standard_normal((batch, rows, embed), np.float32)
    x, out = bench.device.to_device(host), bench.device.empty(host.shape, np.float32)
    ones = bench.device.to_device(np.ones_like(host))
    projections, attention = 4 * batch * rows * embed**2, 2 * batch * rows * rows * embed
    if projections + attention <= CHECKED:
        check(bench, "forward", mha(x, out=out), mha(host))
        mha(x, training=True)
        found = mha.backward(ones)
        mha(host, training=True)
        check(bench, "backward", found.x, mha.backward(np.ones_like(host)).x)
    forward: dict[str, Turn] = {"kernel": Turn(lambda: mha(x, out=out))}

    def both() -> None:
        mha(x, training=True)
        mha.backward(ones)

    backward: dict[str, Turn] = {"kernel": Turn(both)}
    if torch is not None:
        macs = projections + attention
        calls = torch_calls(torch, state, host, heads)
        forward |= {"limit": torch.float_rate(macs), "torch": Turn(calls[0])}
        again = 3 * projections // 4 + attention // 2
        backward |= {"limit": torch.float_rate(3 * macs + again), "torch": Turn(calls[1])}
    sizes = {"sequences": batch, "tokens": rows, "width": embed, "heads": heads}
    bench.add("forward", forward, "float32 rate", **sizes)
    bench.add("forward and backward", backward, "float32 rate", **sizes)


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("multi-head attention", options_of(__doc__ or "", arguments))
    torch = find_torch(bench)
    for shape in SMOKE if bench.smoke else SHAPES:
        measure(bench, torch, shape)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
