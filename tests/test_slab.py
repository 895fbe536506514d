"""Weights side by side in regions of huge pages: their bytes, their count, and what goes back."""

import platform
import random
from pathlib import Path

import fresh
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import _core

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Outputs of matrices of 1024 columns: a page more than the smallest that shares a region, some MB,
# and more than the largest.
SHARING, MIDDLE, ALONE = 576, 20_000, 70_000

HUGE = r"""
import re
from pathlib import Path
import numpy as np
from bitnet_ext import _core

def huge_bytes():
    smaps = Path("/proc/self/smaps").read_text()
    return 1024 * sum(map(int, re.findall(r"AnonHugePages:\s+(\d+)", smaps)))

before = huge_bytes()
matrix = np.ones((6000, 1024), np.int8)  # 1.5 MB packed: smaller than a huge page
held = [_core.PackedTernary.pack(matrix, 1.0, "2") for _ in range(20)]
print((huge_bytes() - before) / sum(weight.nbytes for weight in held))
"""


def packed(n: int, seed: int) -> tuple[_core.PackedTernary, np.ndarray]:
    matrix = np.random.default_rng(seed).integers(-1, 2, (n, 1024)).astype(np.int8)
    return _core.PackedTernary.pack(matrix, 1.0, "2"), matrix


@pytest.mark.parametrize("n", [SHARING, MIDDLE, ALONE])
def test_matrices_keep_their_bytes_while_others_come_and_go(n: int) -> None:
    before = bx.memory_stats().current
    order = random.Random(n)
    held: dict[int, tuple[_core.PackedTernary, np.ndarray]] = {}
    for seed in range(12 if n == ALONE else 40):
        held[seed] = packed(n, seed)
        if len(held) > 4:
            del held[order.choice(sorted(held))]
    for weight, matrix in held.values():
        np.testing.assert_array_equal(weight.unpack(), matrix)
    counted = bx.memory_stats().current - before
    bytes_of_one = n * 1024 // 4 + 4 * n
    assert len(held) * bytes_of_one <= counted <= len(held) * (bytes_of_one + 64 * 1024)
    del weight, matrix
    held.clear()
    assert bx.memory_stats().current == before


def test_pages_go_back_while_a_neighbour_stays() -> None:
    code = f"""
from pathlib import Path
import numpy as np
from bitnet_ext import _core

def resident():
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])

matrix = np.ones(({MIDDLE}, 1024), np.int8)
held = [_core.PackedTernary.pack(matrix, 1.0, "2") for _ in range(11)]  # within one region
full = resident()
del held[1:]
print(full - resident())
assert (held[0].unpack() == 1).all()
"""
    # Ten of 5 MB; the huge pages at both ends have neighbours.
    assert int(fresh.output(code)) > 10 * MIDDLE * 1024 // 4 - 2 * 2**21


def test_small_matrices_lie_in_huge_pages() -> None:
    if platform.machine() != "x86_64":
        pytest.skip("regions are made for the huge pages of x86-64")
    if not SETTING.exists() or "[never]" in SETTING.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    assert float(fresh.output(HUGE)) > 0.5  # none in mappings of their own
