"""A whole model of random weights on the card: prefill, decode and generate of the 2B shape.

Prefill stands beside its multiply-adds at the rates of torch's fastest int8 and a large float16
product, a step of decode beside reading its weights, keys and values once.  Peers: a bfloat16 model
of the same shape in torch, its step one CUDA graph; transformers, eager.  Half precision in
attention and cache.  The bits of a chunked prefill, forward_full and decode are compared first.

    PYTHONPATH=. python bench/gpu/bench_model.py [--json FILE] [--smoke]

ppN: prefill of N tokens; tgC[xB]: a step at a context of C in a batch of B, every logit; gen:
generate, greedy, as a caller waits for it.
"""

from __future__ import annotations

import dataclasses
import gc
import sys
from collections.abc import Sequence

import numpy as np
from harness import Bench, Turn, options_of
from torch_model import GraphedDecoder, Transformers
from torch_peer import Torch, find_torch

import bitnet_ext as bx

PROMPTS = (512, 2048, 8192)
BATCHES = [(1, 128), (1, 2048), (2, 128), (4, 128), (8, 128), (16, 128), (32, 128), (64, 128)]
BESIDE = [(1, 128), (8, 128), (64, 128)]  # where torch's model runs too
STEPS = 16


class ModelBench:
    """The tests of one model."""

    def __init__(self, bench: Bench, config: bx.BitNetConfig, torch: Torch | None) -> None:
        self.bench, self.config, self.torch = bench, config, torch
        self.model = bx.BitNetModel.random(config, kv_dtype="f16", device="cuda", precision="f16")
        self.rng = np.random.default_rng(0)
        self.eager: Transformers | None = None
        if torch is not None:
            try:
                self.eager = Transformers(torch, config)
            except ImportError as error:
                bench.absent["transformers"] = str(error)

    def ids(self, *shape: int) -> np.ndarray:
        return self.rng.integers(0, self.config.vocab_size, shape)

    def check(self) -> None:
        """Three ways to the same bits."""
        host, ids = self.bench.device.to_host, self.ids(12 if self.bench.smoke else 300)
        full = host(self.model.forward_full(ids, logits_to_keep=2))
        cache = self.model.new_cache(1, len(ids))
        last = host(self.model.prefill(ids[:-1], cache, chunk_size=7))
        np.testing.assert_array_equal(last, full[0])
        np.testing.assert_array_equal(host(self.model.decode(ids[-1:], cache))[0], full[1])

    def prefill(self, length: int) -> None:
        ids, cache = self.ids(length), self.model.new_cache(1, length)

        def run() -> None:
            cache.reset()
            self.model.prefill(ids, cache)

        turns = {"kernel": Turn(run)}
        if self.torch is not None:
            c = self.config
            pairs = c.num_layers * c.num_heads * length * (length + 1) // 2
            attended = self.torch.half_rate(2 * c.head_dim * pairs)
            int8 = self.torch.int8_rate(length * linear_macs(c))
            turns["limit"] = Turn(int8.run, int8.amount, attended)
        if self.eager is not None:
            turns["transformers"] = Turn(self.eager.prefill(length))
        row = self.bench.add(f"pp{length}", turns, "matrix rates", tokens=length)
        row["tokens_per_second"] = 1e6 * length / row["us"]

    def decode(self, batch: int, context: int) -> None:
        cache = self.model.new_cache(batch, context + STEPS)
        self.model.prefill(self.ids(batch, context), cache)
        ids = self.bench.device.to_device(self.ids(batch).astype(np.int32))
        out = self.bench.device.empty((batch, self.config.vocab_size), np.float32)

        def run() -> None:
            cache.truncate(context)
            for _ in range(STEPS):
                self.model.decode(ids, cache, out=out)

        run()  # captures the step
        needs = bx.estimate_memory(self.config, batch, context, "decode", "f16", "cuda")
        turns = {
            "kernel": Turn(run, STEPS),
            "limit": self.bench.read(needs.weights + needs.kv_cache),
        }
        if self.torch is not None and (self.bench.smoke or (batch, context) in BESIDE):
            peer = GraphedDecoder(self.torch, self.config, batch, context)
            assert bool(peer.step().isfinite().all())
            turns["torch graph"] = self.torch.graph(peer.step, 1)
            if self.eager is not None:
                turns["transformers"] = self.eager.decode(batch, context, STEPS)
        name = f"tg{context}" + (f"x{batch}" if batch > 1 else "")
        row = self.bench.add(name, turns, "read", sequences=batch)
        row["tokens_per_second"] = 1e6 * batch / row["us"]

    def generate(self, prompt: int, tokens: int) -> None:
        ids = self.ids(prompt).tolist()

        def run() -> None:
            self.model.generate(ids, max_new_tokens=tokens, ignore_eos=True, temperature=0.0)

        row = self.bench.add("gen", {"kernel": Turn(run, tokens)}, wall=True, prompt=prompt)
        row["tokens_per_second"] = 1e6 / row["us"]


def linear_macs(c: bx.BitNetConfig) -> int:
    """Ternary multiply-adds of one token."""
    attention = c.hidden_size * (2 * c.q_size + 2 * c.kv_size)
    ffn = (2 + c.gated_ffn) * c.hidden_size * c.intermediate_size
    return c.num_layers * (attention + ffn)


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("BitNet-b1.58-2B-4T's shape", options_of(__doc__ or "", arguments))
    if bench.smoke:
        config = dataclasses.replace(bx.BitNetConfig.tiny(), num_layers=2)
    else:
        config = bx.BitNetConfig.bitnet_2b_4t()
        config = dataclasses.replace(config, max_position_embeddings=max(PROMPTS))
    tests = ModelBench(bench, config, find_torch(bench))
    tests.check()
    for length in (9,) if bench.smoke else PROMPTS:
        tests.prefill(length)
    for batch, context in [(1, 8), (2, 8)] if bench.smoke else BATCHES:
        tests.decode(batch, context)
        gc.collect()  # a peer's weights go before the next one's come
    tests.generate(*(4, 3) if bench.smoke else (128, 128))
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
