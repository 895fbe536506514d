"""The gate before CuPy, and launches through it: against a stand-in for CuPy, no GPU needed."""

import sys
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.gpu import device, dlpack
from bitnet_ext.gpu.compile import Module
from bitnet_ext.gpu.interchange import kind_of


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


class FakeCupy(SimpleNamespace):
    """As much of CuPy as device.py uses; notes compilations and launches."""

    def __init__(self, devices=1, capability="90", error=None, version="14.2.0"):
        self.__version__ = version
        self.ndarray = type("ndarray", (), {})
        self.compiled, self.launched = [], []

        def count():
            if error:
                raise CUDARuntimeError(error)
            return devices

        runtime = SimpleNamespace(
            getDevice=lambda: 0, getDeviceCount=count, CUDARuntimeError=CUDARuntimeError
        )
        number = SimpleNamespace(
            id=0,
            compute_capability=capability,
            attributes={"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232_448},
        )
        self.cuda = SimpleNamespace(
            runtime=runtime, Device=lambda number_: number, nvrtc=FakeNvrtc(self)
        )
        self.is_available = lambda: not error and devices > 0

    def RawModule(self, *, path):
        assert Path(path).read_bytes() == b"code"
        return SimpleNamespace(get_function=lambda name: FakeKernel(self, name))


class FakeNvrtc:
    """cupy.cuda.nvrtc."""

    NVRTCError = RuntimeError

    def __init__(self, cupy):
        self.cupy, self.getVersion = cupy, lambda: (13, 0)
        self.getSupportedArchs = lambda: (75, 80, 90)
        self.addNameExpression = self.destroyProgram = lambda *args: None
        self.getLoweredName = lambda program, name: f"mangled {name}"
        self.getCUBIN = lambda program: b"code"
        self.getProgramLog = lambda program: ""

    def createProgram(self, source, name, headers, names):
        return source

    def compileProgram(self, program, options):
        self.cupy.compiled.append((program, options))


class FakeKernel:
    """A RawKernel."""

    max_dynamic_shared_size_bytes = 48_000  # without what it has besides

    def __init__(self, cupy, name):
        self.cupy, self.name = cupy, name

    def __call__(self, grid, block, args, *, shared_mem):
        limit = self.max_dynamic_shared_size_bytes
        self.cupy.launched.append((self.name, grid, block, args, shared_mem, limit))


@pytest.fixture
def install(monkeypatch, tmp_path):
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path / "cache"))

    def put(cupy):
        monkeypatch.setitem(sys.modules, "cupy", cupy)
        return cupy

    device._device.cache_clear()
    yield put
    device._device.cache_clear()


@pytest.mark.parametrize(
    ("cupy", "message"),
    [
        (None, r'found no CuPy .*pip install "bitnet-ext\[cuda13\]"'),
        (
            FakeCupy(error="cudaErrorInsufficientDriver"),
            "found cudaErrorInsufficientDriver, wanted",
        ),
        (FakeCupy(devices=0), "found 0 CUDA devices"),
        (
            FakeCupy(version="13.6.0"),
            r'found CuPy 13.6.0, wanted 14 or newer: pip install "bitnet-ext\[cuda13\]"',
        ),
        (FakeCupy(capability="75"), "found compute capability 7.5, wanted 8.0 or newer"),
    ],
)
def test_what_is_missing_is_named(install, cupy, message):
    install(cupy)
    with pytest.raises(DeviceUnavailableError, match=message):
        device.cuda_device()
    with pytest.raises(DeviceUnavailableError, match=message):
        bx.create_causal_mask(2, 2, device="cuda")


def test_launches_compile_a_module_once(install):
    cupy = install(FakeCupy())
    module = Module("mask.cu", ["one", "two"], arch="sm_90a")
    card = device.cuda_device()
    assert card is device.cuda_device()
    assert (card.capability, card.processors, card.block_memory) == (90, 132, 232_448)
    for kernel, grid, shared in [
        ("one", (3,), 0),
        ("one", (3,), 49_152),
        ("two", (3, 0), 0),
        ("two", (3, 4), 60_000),
        ("two", (3, 4), 50_000),
    ]:
        card.launch(module, kernel, grid, (32,), [np.int32(5)], shared)
    args = (np.int32(5),)
    assert cupy.launched == [
        ("mangled one", (3,), (32,), args, 0, 48_000),
        ("mangled one", (3,), (32,), args, 49_152, 49_152),
        ("mangled two", (3, 4), (32,), args, 60_000, 60_000),
        ("mangled two", (3, 4), (32,), args, 50_000, 60_000),
    ]
    [(code, options)] = cupy.compiled
    assert code == module.source()
    assert options == ("-std=c++17", "-fmad=false", "-arch=sm_90a")


@pytest.mark.parametrize("capability", ["80", "90"])
def test_warming_compiles_what_the_device_can_run(install, capability):
    cupy = install(FakeCupy(capability=capability))
    fit = [m for m in device.modules() if m.arch in (None, f"sm_{capability}a")]
    card = device.cuda_device()
    assert card.warm() == sum(len(module.kernels) for module in fit)
    assert [code for code, _ in cupy.compiled] == [module.source() for module in fit]
    card.launch(fit[0], fit[0].kernels[0], (1,), (32,), [])
    assert len(cupy.compiled) == len(fit)


def elsewhere(kind, number):
    """An array of another library."""
    return SimpleNamespace(__dlpack_device__=lambda: (kind, number))


def test_arrays_tell_where_they_live(install):
    install(FakeCupy())
    card = device.cuda_device()
    for host in (np.zeros(3), [1, 2], 5, None, elsewhere(1, 0)):
        assert device.device_of(host) is None
    assert device.device_of(elsewhere(2, 0)) is card
    assert device.device_of(elsewhere(13, 0)) is card
    with pytest.raises(DeviceUnavailableError, match="CUDA device 1, wanted the current one, 0"):
        device.device_of(elsewhere(2, 1))


def test_an_array_on_a_device_needs_cupy(install):
    install(None)
    assert device.device_of(elsewhere(1, 0)) is None
    with pytest.raises(DeviceUnavailableError, match="found no CuPy"):
        device.device_of(elsewhere(2, 0))


def test_results_come_back_as_the_library_of_their_input(install, monkeypatch):
    cupy = install(FakeCupy())
    card = device.cuda_device()
    cupy.ndarray.__module__ = "cupy"
    cupy.ndarray.__dlpack__ = lambda *_: None
    cupy.ndarray.dtype = np.dtype(np.float32)
    own = cupy.ndarray()
    assert card.adopt(own) is own
    assert kind_of("x", own)(own) is own
    assert kind_of("x", np.zeros(3))(own) is own
    tensors = SimpleNamespace(from_dlpack=lambda array: ("tensor", array))
    tensor = type("Tensor", (), {"__module__": "tensors.core", "__dlpack__": None})()
    monkeypatch.setitem(sys.modules, "tensors", tensors)
    assert kind_of("x", tensor)(own) == ("tensor", own)
    cupy.from_dlpack = lambda array: array.__dlpack_device__()
    assert card.adopt(elsewhere(2, 0)) == (2, 0)


def test_bfloat16_has_no_name_between_libraries_and_cupy(install, monkeypatch):
    """CuPy's from_dlpack knows it as little as NumPy's, which stands for it."""
    cupy = install(FakeCupy())
    cupy.from_dlpack = np.from_dlpack
    bits = np.arange(5, dtype=np.uint16)
    tensor = dlpack._Export(bits, 1, 4)
    found = device.cuda_device().adopt(tensor)
    assert found.dtype == ml_dtypes.bfloat16
    assert np.array_equal(found.view(np.uint16), bits)
    tensors = SimpleNamespace(from_dlpack=lambda array: dlpack.taken(np.from_dlpack, "x", array))
    monkeypatch.setitem(sys.modules, "tensors", tensors)
    kind = type("Tensor", (), {"__module__": "tensors.core", "__dlpack__": None})
    back = kind_of("x", kind())(found)
    assert back.dtype == found.dtype
    assert np.array_equal(back.view(np.uint16), bits)


def test_what_a_library_does_not_export_is_named(install):
    def refuse(array):
        raise BufferError("it requires a gradient")

    cupy = install(FakeCupy())
    cupy.from_dlpack = refuse
    with pytest.raises(InvalidShapeError, match=r"found SimpleNamespace \(it requires a gradient"):
        device.cuda_device().adopt(elsewhere(2, 0))
