"""The kernels for AMX as compiled, their tile instructions emulated where the CPU has none."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_disassembly import kernel_object
from test_ternary import product, random_codes, random_q

import bitnet_ext as bx

ROOT = Path(__file__).parents[1]
BASE = ("base/arena", "base/cpu", "base/os_linux", "base/slab", "base/threads")
TERNARY = ("ternary/pack", "ternary/pack_sources", "ternary/product")
NATIVE = "amx_int8" in bx.available_isas()
QUADS = {"2": 4, "1.6": 5}

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") or "avx512vnni" not in bx.available_isas(),
    reason="needs g++ and AVX-512 VNNI: only tiles are emulated",
)

Amx = Callable[..., tuple[np.ndarray, int]]


@pytest.fixture(scope="module")
def amx(tmp_path_factory: pytest.TempPathFactory) -> Amx:
    """ternary_matmul on AMX kernels -> (its result, emulated tile products)."""
    folder = tmp_path_factory.mktemp("amx")
    library, kernel = folder / "amx.so", kernel_object("ternary", "amx_int8", folder)
    sources = [ROOT / "tests/amx_emulator.cpp"]
    sources += [ROOT / f"csrc/{name}.cpp" for name in BASE + TERNARY]
    command = ["g++", "-std=c++20", "-fPIC", "-shared", "-pthread", f"-I{ROOT}/csrc"]
    subprocess.run([*command, *sources, kernel, "-o", library], check=True)
    function = ctypes.CDLL(os.fspath(library)).amx_product
    function.restype = ctypes.c_char_p

    def run(
        q: np.ndarray, codes: np.ndarray, bits: str = "2", threads: int = 1
    ) -> tuple[np.ndarray, int]:
        out = np.full((len(q), len(codes)), 77, np.int32)
        done = ctypes.c_int64()
        fault = function(
            codes.ctypes.data_as(ctypes.c_void_p),
            *map(ctypes.c_int64, codes.shape),
            ctypes.c_int32(QUADS[bits]),
            q.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(len(q)),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int(threads),
            ctypes.byref(done),
        )
        assert fault is None, fault.decode()
        return out, done.value

    return run


@pytest.mark.parametrize("bits", QUADS)
@pytest.mark.parametrize("k", [1, 63, 64, 100, 640, 700, 1300])
@pytest.mark.parametrize("n", [1, 65, 130])
def test_exact_at_every_size(amx: Amx, bits: str, n: int, k: int) -> None:
    codes = random_codes(n, k)
    for rows in (1, 2, 15, 16, 17, 31, 32, 33, 49, 64, 79):
        q = random_q(rows, k)
        out, done = amx(q, codes, bits)
        np.testing.assert_array_equal(out, product(q, codes))
        assert NATIVE or (done > 0) == (rows >= 16 and k > 60)


@pytest.mark.parametrize("bits", QUADS)
@pytest.mark.parametrize("k", [6912, 12000])
def test_saturating_inputs_stay_exact(amx: Amx, bits: str, k: int) -> None:
    for value in (127, -128):
        for code in (-1, 0, 1):
            q, codes = np.full((37, k), value, np.int8), np.full((70, k), code, np.int8)
            out, _ = amx(q, codes, bits)
            np.testing.assert_array_equal(out, np.full((37, 70), k * value * code))


def test_more_rows_than_a_task_takes(amx: Amx) -> None:
    codes, q = random_codes(130, 200), random_q(403, 200)
    out, done = amx(q, codes)
    np.testing.assert_array_equal(out, product(q, codes))
    assert NATIVE or done > 0


@pytest.mark.parametrize("threads", [2, 3])
def test_every_thread_configures_its_own_tiles(amx: Amx, threads: int) -> None:
    codes, q = random_codes(700, 640), random_q(96, 640)
    for _ in range(5):
        out, _ = amx(q, codes, threads=threads)
        np.testing.assert_array_equal(out, product(q, codes))
