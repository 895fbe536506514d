"""The C ABI and its Cython face, used as a stranger would: from an extension built outside."""

import ctypes
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import fresh
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import _core, cython_api

HEADERS = sysconfig.get_path("include")
I64, VOID = ctypes.c_int64, ctypes.c_void_p

# Promises: a name may be added, none may change. An extension built against an older package
# compares these strings when it is loaded.
SIGNATURES = {
    "causal_mask_fill": "int (void *, int64_t, int, int64_t, int64_t, int64_t, int64_t, int64_t)",
    "ternary_weight": "void const *(PyObject *)",
    "ternary_shape": "int (void const *, int64_t *, int64_t *)",
    "ternary_matmul": "int (int8_t const *, int64_t, int64_t, void const *, int32_t *, int64_t)",
    "ternary_linear": "int (float const *, int64_t, int64_t, void const *, float const *, float *, "
    "int64_t)",
    "attention": "int (struct __pyx_t_10bitnet_ext_10cython_api_Heads const *, "
    "struct __pyx_t_10bitnet_ext_10cython_api_Heads const *, "
    "struct __pyx_t_10bitnet_ext_10cython_api_Heads const *, "
    "struct __pyx_t_10bitnet_ext_10cython_api_Heads const *, int64_t, int64_t const *, int, "
    "int64_t, int64_t, int64_t, float, float)",
}
ABI = """
#include "bitnet_ext/capi.h"
#include <stddef.h>
#include <type_traits>
template <class A, class B> constexpr bool same = std::is_same_v<A, B>;
using W = const BitnetExtTernary*;
using i32 = int32_t;
using i64 = int64_t;
static_assert(BITNET_EXT_ABI_VERSION == 1 && offsetof(BitnetExtApi, abi_version) == 0);
static_assert(offsetof(BitnetExtApi, size) == 4);
#define SLOT(n, name, type) \
  static_assert(offsetof(BitnetExtApi, name) == 8 + n * sizeof(void*)); \
  static_assert(same<decltype(BitnetExtApi::name), type>)
SLOT(0, causal_mask_fill, i32 (*)(void*, i64, i32, i64, i64, i64, i64, i64));
SLOT(1, ternary_weight, W (*)(void*));
SLOT(2, ternary_shape, i32 (*)(W, i64*, i64*));
SLOT(3, ternary_matmul, i32 (*)(const int8_t*, i64, i64, W, i32*, i64));
SLOT(4, ternary_linear, i32 (*)(const float*, i64, i64, W, const float*, float*, i64));
using H = const BitnetExtHeads*;
SLOT(5, attention, i32 (*)(H, H, H, H, i64, const i64*, i32, i64, i64, i64, float, float));
static_assert(sizeof(BitnetExtHeads) == 56 && offsetof(BitnetExtHeads, heads) == 8);
static_assert(offsetof(BitnetExtHeads, size) == 24 && offsetof(BitnetExtHeads, row_stride) == 48);
static_assert(BITNET_EXT_OK == 0 && BITNET_EXT_INVALID == 1 && BITNET_EXT_NO_MEMORY == 2);
static_assert(BITNET_EXT_FAILED == 3 && BITNET_EXT_MASK_F32 == 0 && BITNET_EXT_MASK_F16 == 1);
static_assert(BITNET_EXT_MASK_BOOL == 2);
"""
DTYPES = ("float32", "float16", "bool")  # by their number in the ABI

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None, reason="builds an extension: needs g++"
)


# --- the Cython face ------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def downstream(tmp_path_factory):
    """tests/downstream.pyx, built against the installed package and nothing else of ours."""
    if importlib.util.find_spec("Cython") is None or shutil.which("g++") is None:
        pytest.skip("builds an extension: needs Cython and g++")
    if not Path(HEADERS, "Python.h").exists():
        pytest.skip("builds an extension: needs the headers of Python")
    folder = tmp_path_factory.mktemp("downstream")
    shutil.copy(Path(__file__).with_name("downstream.pyx"), folder)
    library = folder / f"downstream{sysconfig.get_config_var('EXT_SUFFIX')}"
    for command in (
        [sys.executable, "-P", "-m", "cython", "--cplus", "-I", fresh.PACKAGE.parent],
        ["g++", "-O2", "-shared", "-fPIC", "-w", "-I", HEADERS, "-o", library],
    ):
        source = "downstream.pyx" if "cython" in command else "downstream.cpp"
        done = subprocess.run([*command, source], cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    spec = importlib.util.spec_from_file_location("downstream", library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_signatures_are_frozen():
    found = {name: repr(capsule) for name, capsule in cython_api.__pyx_capi__.items()}
    assert set(found) == set(SIGNATURES)
    for name, signature in SIGNATURES.items():
        assert f'"{signature}"' in found[name]


def test_constants_are_those_of_the_header(downstream):
    assert downstream.STATUS == (0, 1, 2, 3)
    assert downstream.MASKS == (0, 1, 2)


@pytest.mark.parametrize("kind", range(3))
def test_two_threads_fill_without_the_interpreter(downstream, kind, isa):
    masks = [np.full((37, 90), 1, DTYPES[kind]) for _ in range(2)]
    here, done = np.zeros(1, np.intc), {}

    def work(i):
        rows = masks[i][:, : 50 + i].view(np.int8)
        done[i] = downstream.fill(rows, kind, masks[i].itemsize, 9, 20, 3, here, 2)

    callers = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert done == {0: 0, 1: 0}
    for i, mask in enumerate(masks):
        wanted = bx.create_causal_mask(37, 50 + i, 9, window=(20, 0), prefix=3, dtype=DTYPES[kind])
        assert np.array_equal(mask[:, : 50 + i], wanted)
        assert (mask[:, 50 + i :] == 1).all()


@pytest.mark.parametrize("bits", ["2", "1.6"])
def test_ternary_products_without_the_interpreter(downstream, bits, isa):
    rng = np.random.default_rng(0)
    codes = rng.integers(-1, 2, (70, 50)).astype(np.int8)
    weight = bx.PackedTernary.pack(codes, rng.uniform(0.5, 2, 70).astype(np.float32), bits)
    assert downstream.shape(weight) == (0, 70, 50)
    for rows in (1, 5, 200):
        q = rng.integers(-128, 128, (rows, 64)).astype(np.int8)[:, :50]
        out = np.full((rows, 80), 7, np.int32)
        assert downstream.matmul(q, weight, out) == 0
        assert np.array_equal(out[:, :70], q.astype(np.int32) @ codes.T)
        assert (out[:, 70:] == 7).all()
        x = rng.normal(0, 3, (rows, 64)).astype(np.float32)[:, 5:55]
        bias = rng.normal(0, 1, 70).astype(np.float32)
        for b in (None, bias):
            y = np.full((rows, 80), 7, np.float32)
            assert downstream.linear(x, weight, b, y) == 0
            assert np.array_equal(y[:, :70], bx.ternary_linear(x, weight, b))
            assert (y[:, 70:] == 7).all()


def test_attention_without_the_interpreter(downstream, isa):
    rng = np.random.default_rng(1)
    q = rng.normal(0, 1, (2, 5, 6, 8)).astype(np.float32).transpose(0, 2, 1, 3)  # 6 heads, 5 rows
    k, v = (rng.normal(0, 1, (2, 3, 70, n)).astype(np.float32)[:, ::-1] for n in (8, 12))
    for lengths, past in ((None, 0), (None, 60), (np.array([70, 3]), 0)):
        for causal, left, right, softcap in ((True, -1, -1, 0.0), (False, 20, 4, 2.5)):
            out = np.full((2, 6, 5, 16), 7, np.float32)
            status = downstream.attention(
                q, k, v, out[..., :12], lengths, causal, past, left, right, 0.3, softcap
            )
            assert status == 0
            options = {"past_len": past, "kv_lengths": lengths, "window": (left, right)}
            wanted = bx.attention(q, k, v, causal=causal, scale=0.3, softcap=softcap, **options)
            assert np.array_equal(out[..., :12], wanted)
            assert (out[..., 12:] == 7).all()


def test_another_object_is_no_weight(downstream):
    with pytest.raises(TypeError, match=r"found numpy.ndarray, wanted bitnet_ext.PackedTernary"):
        downstream.shape(np.zeros(3))


def test_it_shares_dispatch_and_metrics(downstream):
    before = bx.get_isa()
    bx.set_isa("scalar")
    try:
        out, here = np.zeros((4, 4), np.bool_), np.zeros(1, np.intc)
        with bx.DispatchMetrics() as metrics:
            assert downstream.fill(out.view(np.int8), 2, 1, 0, -1, 0, here, 1) == 0
        assert list(metrics.as_dict()) == [("mask_fill", "cpu", "scalar", "op")]
    finally:
        bx.set_isa(before)


# --- the C ABI ------------------------------------------------------------------------------------
class Api(ctypes.Structure):
    _fields_ = (
        ("abi_version", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
        (
            "causal_mask_fill",
            ctypes.CFUNCTYPE(ctypes.c_int32, VOID, I64, ctypes.c_int32, *[I64] * 5),
        ),
        ("ternary_weight", ctypes.PYFUNCTYPE(VOID, ctypes.py_object)),
        ("ternary_shape", ctypes.CFUNCTYPE(ctypes.c_int32, VOID, VOID, VOID)),
        ("ternary_matmul", ctypes.CFUNCTYPE(ctypes.c_int32, VOID, I64, I64, VOID, VOID, I64)),
        ("ternary_linear", ctypes.CFUNCTYPE(ctypes.c_int32, VOID, I64, I64, VOID, VOID, VOID, I64)),
        (
            "attention",
            ctypes.CFUNCTYPE(
                ctypes.c_int32,
                *[VOID] * 4,
                I64,
                VOID,
                ctypes.c_int32,
                *[I64] * 3,
                ctypes.c_float,
                ctypes.c_float,
            ),
        ),
    )


class Heads(ctypes.Structure):
    _fields_ = (
        ("data", VOID),
        *((name, I64) for name in ("heads", "rows", "size")),
        *((f"{axis}_stride", I64) for axis in ("batch", "head", "row")),
    )


@pytest.fixture(scope="module")
def api():
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = VOID, [ctypes.py_object, ctypes.c_char_p]
    return Api.from_address(pointer(_core._C_API, b"bitnet_ext._core._C_API"))


@needs_compiler
def test_the_header_is_installed_and_frozen(tmp_path):
    (tmp_path / "abi.cpp").write_text(ABI)
    (tmp_path / "abi.c").write_text('#include "bitnet_ext/capi.h"\nBitnetExtApi api;\n')
    for compiler, source in (("-std=c++17", "abi.cpp"), ("-std=c99", "abi.c")):
        done = subprocess.run(
            ["g++" if source == "abi.cpp" else "gcc", compiler, "-Wall", "-Wextra", "-pedantic",
             "-Werror", "-fsyntax-only", f"-I{fresh.PACKAGE.parent}", source],
            cwd=tmp_path, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_version_and_size(api):
    assert (api.abi_version, api.size) == (1, ctypes.sizeof(Api))


def test_rows_of_a_mask_in_any_direction(api):
    out = np.zeros((5, 7), np.float32)
    status = api.causal_mask_fill(out[-1:].ctypes.data, -out.strides[0], 0, 5, 7, 1, -1, 0)
    assert status == 0
    assert np.array_equal(out[::-1], bx.create_causal_mask(5, 7, 1))


def test_nothing_to_do_is_no_error(api):
    weight = bx.PackedTernary.pack(np.ones((3, 4), np.int8), 1.0)
    handle = api.ternary_weight(weight)
    assert api.causal_mask_fill(None, 0, 0, 0, 9, 0, -1, 0) == 0
    assert api.causal_mask_fill(None, 0, 0, 9, 0, 0, -1, 0) == 0
    assert api.ternary_matmul(None, 0, 0, handle, None, 0) == 0
    assert api.ternary_linear(None, 0, 0, handle, None, None, 0) == 0


def test_what_makes_no_sense_is_invalid_and_writes_nothing(api):
    weight = bx.PackedTernary.pack(np.ones((3, 4), np.int8), 1.0)
    w = api.ternary_weight(weight)
    out = np.full((8, 8), 7, np.int32)
    p, q, size = out.ctypes.data, np.ones((2, 4), np.int8), I64()
    n = ctypes.addressof(size)
    fill, matmul, linear = api.causal_mask_fill, api.ternary_matmul, api.ternary_linear
    for status in (
        fill(None, 32, 0, 2, 8, 0, -1, 0),
        fill(p, 31, 0, 2, 8, 0, -1, 0),
        fill(p, -31, 0, 2, 8, 0, -1, 0),
        fill(p, -(2**63), 0, 2, 2**60 + 1, 0, -1, 0),
        fill(p, 32, 3, 2, 8, 0, -1, 0),
        fill(p, 32, -1, 2, 8, 0, -1, 0),
        fill(p, 32, 0, -1, 8, 0, -1, 0),
        fill(p, 32, 0, 2, -1, 0, -1, 0),
        fill(p, 32, 0, 2, 8, -1, -1, 0),
        fill(p, 32, 0, 2, 8, 2**62, -1, 0),
        fill(p, 32, 0, 2, 8, 0, -1, -1),
        fill(p, 32, 0, 2, 8, 0, 2**62, 0),
        matmul(q.ctypes.data, 2, 4, None, p, 8),
        matmul(None, 2, 4, w, p, 8),
        matmul(q.ctypes.data, 2, 4, w, None, 8),
        matmul(q.ctypes.data, -1, 4, w, p, 8),
        matmul(q.ctypes.data, 2, 3, w, p, 8),
        matmul(q.ctypes.data, 2, 4, w, p, 2),
        linear(p, 2, 8, None, None, p, 8),
        linear(None, 2, 8, w, None, p, 8),
        linear(p, 2, 3, w, None, p, 8),
        linear(p, 2, 8, w, None, p, 2),
        api.ternary_shape(None, n, n),
        api.ternary_shape(w, None, n),
        api.ternary_shape(w, n, None),
    ):
        assert status == 1
    assert (out == 7).all()


def test_attention_that_makes_no_sense_is_invalid_and_writes_nothing(api):
    a = np.zeros((2, 2, 3, 4), np.float32)
    out = np.full_like(a, 7)

    def call(batch=2, lengths=None, past=0, scale=1.0, softcap=0.0, **changes):
        parts = []
        for name, array in zip("qkvo", (a, a, a, out), strict=True):
            h = Heads(array.ctypes.data, 2, 3, 4, 24, 12, 4)
            for field, value in changes.items():
                if field.startswith(name):
                    setattr(h, field[2:], value)
            parts.append(h)
        given = None if lengths is None else np.array(lengths, np.int64)
        n = None if given is None else given.ctypes.data
        pointers = [ctypes.byref(h) for h in parts]
        return api.attention(*pointers, batch, n, 1, past, -1, -1, scale, softcap)

    for status in (
        call(batch=-1),
        call(q_data=None),
        call(o_data=None),
        call(q_size=0, k_size=0),
        call(q_size=3),
        call(q_size=2000, k_size=2000),
        call(k_rows=2),
        call(v_rows=-1),
        call(q_heads=3),
        call(q_heads=3, o_heads=3),
        call(q_heads=2**62, k_heads=2**62, v_heads=2**62, o_heads=2**62),
        call(batch=2**62),
        call(k_heads=0, v_heads=0),
        call(o_size=3),
        call(past=-1),
        call(past=2**40),
        call(lengths=[4, 0]),
        call(lengths=[0, -1]),
        call(lengths=[1, 1], past=1),
        call(scale=float("nan")),
        call(softcap=-1.0),
        call(softcap=float("inf")),
        api.attention(None, None, None, None, 1, None, 0, 0, -1, -1, 1.0, 0.0),
    ):
        assert status == 1
    assert (out == 7).all()
    assert call(batch=0, q_data=None, o_data=None) == 0
    assert call(lengths=[3, 3]) == 0
    assert (out == 0).all()


def test_memory_and_isa_that_are_refused(api):
    weight = bx.PackedTernary.pack(np.ones((3, 4), np.int8), 1.0)
    x = np.ones((1, 4), np.float32)
    pointer = x.ctypes.data
    bx.set_memory_limit(1)
    try:
        status = api.ternary_linear(pointer, 1, 4, api.ternary_weight(weight), None, pointer, 4)
    finally:
        bx.set_memory_limit(None)
    assert status == 2
    assert (x == 1).all()
    code = (
        "import ctypes, os\n"
        "os.environ['BITNET_ISA'] = 'never'\n"
        "from bitnet_ext import _core\n"
        "p = ctypes.pythonapi.PyCapsule_GetPointer\n"
        "p.restype, p.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]\n"
        "table = p(_core._C_API, b'bitnet_ext._core._C_API')\n"
        "i = ctypes.c_int64\n"
        "kind = ctypes.CFUNCTYPE(ctypes.c_int32, ctypes.c_void_p, i, ctypes.c_int32, *[i] * 5)\n"
        "fill = kind(ctypes.c_void_p.from_address(table + 8).value)\n"
        "print(fill(ctypes.create_string_buffer(64), 4, 2, 4, 4, 0, -1, 0))\n"
    )
    assert fresh.output(code) == "3"
