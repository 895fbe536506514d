"""The vocabulary on the card: the projection, the largest logits, the choice of a token.

128,256 rows of 2560.  The limit is reading the bytes that must be read; the peer of a projection is
torch's bfloat16 product.  Some logits are compared with float64, choices with the CPU's.  The
screened projection finds the largest logits of a random table, where none stands out, and of hidden
states that point at a row of it; its limit reads the first plane and the logits twice, its peer is
the whole projection.

    PYTHONPATH=. python bench/gpu/bench_vocab.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import Torch, find_torch

from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.sample import Choice, DeviceSampler
from bitnet_ext.gpu.screen import ScreenedTop
from bitnet_ext.gpu.screen_table import ScreenTable
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.gpu.topk import TopK

ROWS = (1, 4, 16, 64)
CHOICES = {
    "greedy": Choice(greedy=True),
    "temperature": Choice(greedy=False),
    "top-k 50, top-p 0.9": Choice(greedy=False, top_k=50, top_p=0.9),
}


def projections(bench: Bench, torch: Torch | None, vocab: int, width: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((vocab, width), np.float32).view(np.uint32) >> 16 << 16
    codes = rng.integers(-127, 128, (vocab, width), np.int8)
    tables = {
        "bf16": DeviceTable.upload(bench.device, (values >> 16).astype(np.uint16), "bf16"),
        "int8": DeviceTable.upload(bench.device, codes, "int8", np.ones(vocab, np.float32)),
    }
    dense = {"bf16": values.view(np.float32), "int8": codes}
    peer = None if torch is None else torch.randn(vocab, width)
    for name, table in tables.items():
        for rows in (1, 4) if bench.smoke else ROWS:
            host = rng.standard_normal((rows, width), np.float32)
            x = bench.device.to_device(host)
            out = bench.device.empty((rows, vocab), np.float32)

            def kernel(x: object = x, table: DeviceTable = table, out: object = out) -> None:
                project(bench.device, x, table, None, out)

            kernel()
            wanted = host.astype(np.float64) @ dense[name][:64].astype(np.float64).T
            found = bench.device.to_host(out)[:, :64]
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * abs(wanted).max())
            nbytes = table.nbytes + 4 * rows * (vocab + width)
            turns = {"kernel": bench.graph(kernel), "limit": bench.read(nbytes)}
            if torch is not None and name == "bf16":
                y = torch.randn(rows, width)
                turns["torch bf16"] = torch.graph(lambda y=y: y @ peer.T)
            bench.add(f"projection {name}", turns, "read", rows=rows)


def screened(bench: Bench, vocab: int, width: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((vocab, width), np.float32).view(np.uint32) >> 16 << 16
    table = DeviceTable.upload(bench.device, (values >> 16).astype(np.uint16), "bf16")
    screen = ScreenTable.of(bench.device, table)
    for rows in (1, 4) if bench.smoke else ROWS:
        random = rng.standard_normal((rows, width), np.float32)
        pointed = values.view(np.float32)[:rows] * np.float32(0.8) + random * np.float32(0.3)
        for kind, host in (("random", random), ("aligned", pointed)):
            for k in (1, 8) if vocab >= 512 else (1,):
                turns = screened_rows(bench, table, screen, bench.device.to_device(host), k)
                bench.add(f"screened top-{k} {kind}", turns, "read", rows=rows)


def screened_rows(
    bench: Bench, table: DeviceTable, screen: ScreenTable, x: Any, k: int
) -> dict[str, Turn]:
    rows, vocab = len(x), screen.vocab
    out = bench.device.empty((rows, vocab), np.float32)
    top = ScreenedTop(bench.device, table, None, screen, rows, k)
    whole = bench.graph(lambda: project(bench.device, x, table, None, out))
    exact = bench.device.to_host(out)
    work = bench.graph(lambda: top.project(x, out))
    wanted = exact >= np.sort(exact)[:, -k, None]
    np.testing.assert_array_equal(bench.device.to_host(out)[wanted], exact[wanted])
    limit = bench.read(int(screen.high.nbytes) + 8 * rows * vocab)
    return {"kernel": work, "limit": limit, "whole": whole}


def choices(bench: Bench, torch: Torch | None, vocab: int) -> None:
    host = np.random.default_rng(0).normal(0, 4, (1, vocab)).astype(np.float32)
    logits = bench.device.to_device(host)
    positions, tokens = (bench.device.to_device(np.zeros(1, np.int32)) for _ in range(2))
    for name, choice in CHOICES.items():
        sampler = DeviceSampler(bench.device, 1, vocab, choice)
        work = bench.graph(lambda s=sampler: s.choose(logits, positions, tokens))
        if choice.greedy:
            assert bench.device.to_host(tokens)[0] == host[0].argmax()
        bench.add(
            f"sample {name}", {"kernel": work, "limit": bench.read(4 * vocab)}, "read", rows=1
        )
    k = min(50, vocab)
    finder = TopK(bench.device, 1, vocab, k)
    turns = {"kernel": bench.graph(lambda: finder.find(logits)), "limit": bench.read(4 * vocab)}
    order = np.argsort(-host[0], kind="stable")[:k]
    np.testing.assert_array_equal(bench.device.to_host(finder.ids)[0], order)
    if torch is not None:
        dense = torch.tensor(host)
        turns["torch topk"] = torch.graph(lambda: torch.torch.topk(dense, k))
    bench.add(f"top-k {k}", turns, "read", rows=1)


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("vocabulary", options_of(__doc__ or "", arguments))
    torch = find_torch(bench)
    vocab, width = (300, 48) if bench.smoke else (128256, 2560)
    projections(bench, torch, vocab, width)
    screened(bench, vocab, width)
    choices(bench, torch, vocab)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
