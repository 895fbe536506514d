"""Ternary products on the card in the shapes of BitNet-b1.58-2B-4T, and the norm before them.

Up to 64 rows ("gemv") stand beside reading their bytes once, over copies of a matrix that exceed
the second-level cache; more rows ("gemm") beside the rate of torch._int_mm's fastest shape.  Peers:
torch._int_mm on the weights expanded to int8 (for fewer rows, the 32 that it takes), and a bfloat16
linear layer.  Some rows of each product are compared with the CPU's first, bit for bit.

    PYTHONPATH=. python bench/gpu/bench_ternary.py [--rows 1 64 2048] [--json FILE] [--smoke]
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from harness import Bench, Turn, options_of
from torch_peer import Torch, find_torch

from bitnet_ext import _core
from bitnet_ext.gpu.product import Product
from bitnet_ext.gpu.quantise import Activations, NormRows, arrange, norm_quantise
from bitnet_ext.gpu.ternary import activations, norm_product, product, split_room
from bitnet_ext.gpu.weight import DeviceTernary

SHAPES = {"qkv": (3840, 2560), "o": (2560, 2560), "gate_up": (13824, 2560), "down": (2560, 6912)}
FEW = (1, 2, 4, 8, 16, 32, 64)
MANY = (128, 256, 512, 1024, 2048, 4096, 8192)
LEAST_INT_MM = 32  # rows; it takes no 16
CACHE = 256 << 20  # bytes: more than four times the second-level cache of any card


class Matrix:
    """A random ternary matrix on the device, and as many copies as exceed the cache."""

    def __init__(self, bench: Bench, n: int, k: int) -> None:
        rng = np.random.default_rng(n + k)
        codes = rng.integers(-1, 2, (n, k), np.int8)
        self.packed = _core.PackedTernary.pack(codes, 0.02, bits="2")
        self.codes = codes
        first = DeviceTernary(bench.device, self.packed)
        self.copies = [first]
        for _ in range(copies(bench, first.nbytes) - 1):
            twin = copy.copy(first)
            twin.words = bench.device.empty(first.words.shape, np.uint32)
            twin.words[...] = first.words
            self.copies.append(twin)


def copies(bench: Bench, nbytes: int) -> int:
    return 2 if bench.smoke else max(1, -(-CACHE // nbytes))


class Rows:
    """Random quantised rows on the device."""

    def __init__(self, bench: Bench, rows: int, k: int) -> None:
        rng = np.random.default_rng(rows)
        self.q = rng.integers(-127, 128, (rows, k), np.int8)
        self.s = rng.uniform(1, 100, rows).astype(np.float32)
        self.x: Activations = activations(bench.device, rows, k)
        arrange(bench.device, bench.device.to_device(self.q), self.x)
        bench.device.write(self.x.scales, self.s)


def check(bench: Bench, matrix: Matrix, rows: Rows, out: Any) -> None:
    """The first, a middle and the last row have the CPU's bits."""
    product(bench.device, Product(rows.x, matrix.copies[0], out))
    picked = sorted({0, rows.x.rows // 2, rows.x.rows - 1})
    wanted = np.empty((len(picked), matrix.packed.shape[0]), np.float32)
    _core.ternary_linear(rows.q[picked], rows.s[picked], matrix.packed, None, False, wanted)
    found = np.stack([bench.device.to_host(out[row]) for row in picked])
    np.testing.assert_array_equal(found.view(np.uint32), wanted.view(np.uint32))


def peers(bench: Bench, torch: Torch, matrix: Matrix, rows: Rows, many: bool) -> dict[str, Turn]:
    """torch's products of the same rows, of int8 and of bfloat16."""
    n, k = matrix.packed.shape
    count = rows.x.rows
    taken = np.resize(rows.q, (max(count, LEAST_INT_MM), k))
    a, b = torch.tensor(taken), torch.tensor(matrix.codes)
    found = torch.torch._int_mm(a, b.t())[: min(4, count)].cpu().numpy()
    wanted = np.empty((len(found), n), np.int32)
    _core.ternary_matmul(rows.q[: len(found)], matrix.packed, wanted)
    np.testing.assert_array_equal(found, wanted)
    wide, weight = (tensor.to(torch.torch.bfloat16) for tensor in (a[:count], b))
    bytes_of = [1 if many else copies(bench, size) for size in (n * k, 2 * n * k)]
    dense = [b.clone() for _ in range(bytes_of[0])]
    halves = [weight.clone() for _ in range(bytes_of[1])]

    def int8() -> None:
        for each in dense:
            torch.torch._int_mm(a, each.t())

    def bf16() -> None:
        for each in halves:
            torch.torch.nn.functional.linear(wide, each)

    inner = 4 if many else 1
    return {
        "torch int8": torch.graph(int8, inner, len(dense)),
        "torch bf16": torch.graph(bf16, inner, len(halves)),
    }


def measure(bench: Bench, torch: Torch | None, name: str, matrix: Matrix, count: int) -> None:
    n, k = matrix.packed.shape
    many = count > max(FEW)
    rows = Rows(bench, count, k)
    out = bench.device.empty((count, n), np.float32)
    check(bench, matrix, rows, out)
    weights = matrix.copies[:1] if many else matrix.copies
    split = split_room(bench.device, count)
    works = [Product(rows.x, weight, out, split=split) for weight in weights]

    def kernel() -> None:
        for work in works:
            product(bench.device, work)

    turns = {"kernel": bench.graph(kernel, 4 if many else 1, len(works))}
    if not many:
        turns["limit"] = bench.read(weights[0].nbytes + count * (k + 4 * n))
    elif torch is not None:
        turns["limit"] = torch.int8_rate(count * n * k)
    if torch is not None:
        turns |= peers(bench, torch, matrix, rows, many)
    row = bench.add(
        f"{'gemm' if many else 'gemv'} {name}", turns, "int8 rate" if many else "read", rows=count
    )
    row["tops"] = 2e-6 * count * n * k / row["us"]
    row["macs_per_byte"] = count * n * k / (n * k / 4 + count * (k + 4 * n))


def measure_normed(bench: Bench, name: str, matrix: Matrix, count: int) -> None:
    """RMS norm, quantisation and product, as a decode step runs them, beside reading the bytes."""
    n, k = matrix.packed.shape
    host, ones = np.random.default_rng(0).standard_normal((count, k), np.float32), np.ones(k, "f4")
    room, split = activations(bench.device, count, k), split_room(bench.device, count)
    out = bench.device.empty((count, n), np.float32)
    x = NormRows(bench.device.to_device(host), "rms", bench.device.to_device(ones), None, 1e-5)
    works = [Product(room, weight, out, split=split) for weight in matrix.copies]

    def kernel() -> None:
        for work in works:
            norm_product(bench.device, x, work)

    kernel()
    q, s, wanted = np.empty((1, k), np.int8), np.empty(1, np.float32), np.empty((1, n), np.float32)
    _core.norm_quant(host[-1:], ones, None, 1e-5, "rms", q, s)
    _core.ternary_linear(q, s, matrix.packed, None, False, wanted)
    np.testing.assert_array_equal(bench.device.to_host(out)[-1:], wanted)
    turns = {
        "kernel": bench.graph(kernel, 1, len(works)),
        "limit": bench.read(matrix.copies[0].nbytes + 4 * count * (k + n)),
    }
    bench.add(f"norm and gemv {name}", turns, "read", rows=count)


def measure_quantise(bench: Bench, count: int, k: int) -> None:
    """RMS norm and quantisation of float32 rows, beside a copy of as many bytes."""
    host = np.random.default_rng(0).standard_normal((count, k), np.float32)
    x, weight = bench.device.to_device(host), bench.device.to_device(np.ones(k, np.float32))
    room = activations(bench.device, count, k)

    def kernel() -> None:
        norm_quantise(bench.device, NormRows(x, "rms", weight, None, 1e-5), room)

    kernel()
    picked = [0, count - 1]
    q, s = np.empty((2, k), np.int8), np.empty(2, np.float32)
    _core.norm_quant(host[picked], np.ones(k, np.float32), None, 1e-5, "rms", q, s)
    np.testing.assert_array_equal(bench.device.to_host(room.scales)[picked], s)
    turns = {"kernel": bench.graph(kernel), "limit": bench.copy(5 * count * k)}
    bench.add("norm and quantise", turns, "copy", rows=count, width=k)


def main(arguments: Sequence[str] | None = None) -> int:
    options = options_of(
        __doc__ or "", arguments, ("--rows", {"type": int, "nargs": "*", "default": [*FEW, *MANY]})
    )
    bench = Bench("ternary products", options)
    torch = find_torch(bench)
    shapes = {"small": (70, 136)} if bench.smoke else SHAPES
    counts = [1, 17, 130] if bench.smoke else options.rows
    for name, (n, k) in shapes.items():
        matrix = Matrix(bench, n, k)
        for count in counts:
            measure(bench, torch, name, matrix, count)
            if count <= max(FEW):
                measure_normed(bench, name, matrix, count)
    for count in (3,) if bench.smoke else (2048, 8192):
        measure_quantise(bench, count, 136 if bench.smoke else 2560)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
