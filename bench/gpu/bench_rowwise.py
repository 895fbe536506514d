"""Work by rows on the card: norms, rotations, appends to the cache, embeddings, activations and
log-probabilities, of the 2B shape.

All wait for memory: the limit copies the bytes that are read and written, or reads where a row
gives a number.  Peers are torch's, in float32 but for the embedding.  Some rows are compared with
the CPU's first.

    PYTHONPATH=. python bench/gpu/bench_rowwise.py [--json FILE] [--smoke]
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import Torch, find_torch

import bitnet_ext as bx
from bitnet_ext.gpu.activate import activate
from bitnet_ext.gpu.embed import embed
from bitnet_ext.gpu.kv_append import append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows
from bitnet_ext.gpu.logprob import gather_logprobs
from bitnet_ext.gpu.rowwise import norm, rotary
from bitnet_ext.gpu.tables import DeviceTable

ROWS, LOGIT_ROWS, CHECKED = 8192, 256, 4
Q_HEADS, KV_HEADS, DIM = 20, 5, 128
CACHES: tuple[Literal["f32", "f16", "int8"], ...] = ("f32", "f16", "int8")


class Rows:
    """The bench, its shape, and arrays of random numbers on host and device."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.device, self.torch = bench, bench.device, find_torch(bench)
        smoke = bench.smoke
        self.rows, self.logit_rows = (6, 3) if smoke else (ROWS, LOGIT_ROWS)
        self.width, self.inner, self.vocab = (48, 80, 300) if smoke else (2560, 6912, 128256)
        self._rng = np.random.default_rng(0)

    def normal(self, *shape: int) -> tuple[Any, Any]:
        host = self._rng.standard_normal(shape, np.float32)
        return host, self.device.to_device(host)

    def integers(self, most: int, count: int) -> tuple[Any, Any]:
        host = self._rng.integers(0, most, count, np.int32)
        return host, self.device.to_device(host)

    def same(self, found: Any, wanted: Any) -> None:
        """The first rows have the CPU's bits."""
        first = self.device.to_host(found[:CHECKED])
        np.testing.assert_array_equal(first, np.asarray(wanted)[:CHECKED])

    def add(
        self,
        name: str,
        work: Callable[[], object],
        limit: Turn,
        peer: tuple[str, Callable[[Torch], Callable[[], object]]] | None = None,
        *,
        reads: bool = False,
        **shape: Any,
    ) -> None:
        turns = {"kernel": self.bench.graph(work), "limit": limit}
        if self.torch is not None and peer is not None:
            named, made = peer
            turns[f"torch {named}"] = self.torch.graph(made(self.torch))
        self.bench.add(name, turns, "read" if reads else "copy", **shape)


def norms(r: Rows) -> None:
    (host, x), (host_w, w), (host_b, b) = (
        r.normal(*shape) for shape in ((r.rows, r.width), (r.width,), (r.width,))
    )
    out = r.device.empty(x.shape, np.float32)

    def rms(torch: Torch) -> Callable[[], object]:
        operands = torch.tensor(host), (r.width,), torch.tensor(host_w)
        return lambda: torch.torch.nn.functional.rms_norm(*operands, 1e-5)

    def layer(torch: Torch) -> Callable[[], object]:
        operands = torch.tensor(host), (r.width,), torch.tensor(host_w), torch.tensor(host_b)
        return lambda: torch.torch.nn.functional.layer_norm(*operands, 1e-5)

    def measure(kind: Literal["rms", "layer"], bias: Any, wanted: Any, peer: Any) -> None:
        def work() -> None:
            norm(r.device, x, w, bias, 1e-5, kind, out)

        work()
        r.same(out, wanted)
        r.add(f"{kind} norm", work, r.bench.copy(2 * x.nbytes), (f"{kind}_norm", peer), rows=r.rows)

    first = host[:CHECKED]
    measure("rms", None, bx.rms_norm(first, host_w), rms)
    measure("layer", b, bx.layer_norm(first, host_w, host_b), layer)


def rotations(r: Rows) -> None:
    host, x = r.normal(1, Q_HEADS, r.rows, DIM)
    angles = r.normal(r.rows, DIM // 2)[0]
    cos, sin = (r.device.to_device(f(angles)) for f in (np.cos, np.sin))
    out = r.device.empty(x.shape, np.float32)
    rotary(r.device, x, cos, sin, None, False, out, first=0)
    wanted = bx.rotary_embedding(
        host[:, :, :CHECKED], *(f(angles)[None, :CHECKED] for f in (np.cos, np.sin))
    )
    np.testing.assert_array_equal(r.device.to_host(out[:, :, :CHECKED]), wanted)
    r.add(
        "rotary",
        lambda: rotary(r.device, x, cos, sin, None, False, out, first=0),
        r.bench.copy(2 * x.nbytes + 2 * cos.nbytes),
        rows=r.rows,
        heads=Q_HEADS,
    )


def appends(r: Rows, kv_dtype: Literal["f32", "f16", "int8"]) -> None:
    """Queries turned in place, keys turned and values, rounded, to their pages."""
    host, qkv = r.normal(r.rows, (Q_HEADS + 2 * KV_HEADS) * DIM)
    angles = np.outer(np.arange(r.rows), np.linspace(1, 0.001, DIM // 2)).astype(np.float32)
    cos, sin = (r.device.to_device(f(angles)) for f in (np.cos, np.sin))
    cache = DeviceCache(r.device, 1, 1, KV_HEADS, DIM, DIM, r.rows, kv_dtype)
    rows = DeviceRows.ragged(r.device, [r.rows])
    append(cache, 0, qkv, rows, cos, sin)
    if kv_dtype != "int8":  # the first token is not turned
        first = host[0, Q_HEADS * DIM :].astype(cache.keys.dtype).reshape(2, KV_HEADS, DIM)
        for kept, wanted in zip((cache.keys, cache.values), first, strict=True):
            np.testing.assert_array_equal(r.device.to_host(kept[0, 0, :, 0]), wanted)
    stored = 2 * KV_HEADS * (DIM * cache.keys.itemsize + (4 if kv_dtype == "int8" else 0))
    nbytes = qkv.nbytes + r.rows * (4 * Q_HEADS * DIM + stored) + 2 * cos.nbytes
    r.add(
        f"append {kv_dtype}",
        lambda: append(cache, 0, qkv, rows, cos, sin),
        r.bench.copy(nbytes),
        rows=r.rows,
    )


def embeddings(r: Rows) -> None:
    values = r.normal(r.vocab, r.width)[0].view(np.uint32) >> 16 << 16
    table = DeviceTable.upload(r.device, (values >> 16).astype(np.uint16), "bf16")
    ids, on_device = r.integers(r.vocab, r.rows)
    out = r.device.empty((r.rows, r.width), np.float32)
    embed(r.device, table, on_device, out)
    r.same(out, values.view(np.float32)[ids[:CHECKED]])

    def peer(torch: Torch) -> Callable[[], object]:
        theirs = torch.tensor(values.view(np.float32)).to(torch.torch.bfloat16)
        wanted = torch.tensor(ids)
        return lambda: torch.torch.nn.functional.embedding(wanted, theirs)

    r.add(
        "embed bf16",
        lambda: embed(r.device, table, on_device, out),
        r.bench.copy(r.rows * r.width * (2 + 4)),
        ("embedding", peer),
        rows=r.rows,
    )


def activations(r: Rows) -> None:
    host, x = r.normal(r.rows, 2 * r.inner)
    out = r.device.empty((r.rows, r.inner), np.float32)
    activate(r.device, x, out, "relu2", True)
    gate, up = np.split(host[:CHECKED], 2, 1)
    r.same(out, np.maximum(gate, 0) ** 2 * up)

    def peer(torch: Torch) -> Callable[[], object]:
        gate, up = torch.tensor(host).chunk(2, 1)
        return lambda: torch.torch.nn.functional.silu(gate) * up

    for kind in ("relu2", "silu", "gelu"):
        r.add(
            f"{kind} gated",
            lambda kind=kind: activate(r.device, x, out, kind, True),
            r.bench.copy(x.nbytes + out.nbytes),
            ("silu", peer) if kind == "silu" else None,
            rows=r.rows,
        )


def logprobs(r: Rows) -> None:
    host, logits = r.normal(r.logit_rows, r.vocab)
    ids, targets = r.integers(r.vocab, r.logit_rows)
    found = r.device.empty((r.logit_rows,), np.float32)
    greedy = r.device.empty((r.logit_rows,), np.bool_)
    gather_logprobs(r.device, logits, targets, found, greedy)
    exact = host[:CHECKED].astype(np.float64)
    wanted = exact[np.arange(len(exact)), ids[:CHECKED]] - np.log(np.exp(exact).sum(1))
    np.testing.assert_allclose(r.device.to_host(found[:CHECKED]), wanted, rtol=1e-5)

    def peer(torch: Torch) -> Callable[[], object]:
        theirs, at = torch.tensor(host), torch.tensor(ids.astype(np.int64)[:, None])
        return lambda: torch.torch.log_softmax(theirs, 1).gather(1, at)

    r.add(
        "log-probabilities",
        lambda: gather_logprobs(r.device, logits, targets, found, greedy),
        r.bench.read(logits.nbytes),
        ("log_softmax", peer),
        reads=True,
        rows=r.logit_rows,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    bench = Bench("rowwise", options_of(__doc__ or "", arguments))
    rows = Rows(bench)
    norms(rows)
    rotations(rows)
    for kv_dtype in CACHES:
        appends(rows, kv_dtype)
    embeddings(rows)
    activations(rows)
    logprobs(rows)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
