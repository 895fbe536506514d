"""NVRTC and nvdisasm from PyPI through ctypes: real machine code without a GPU or a driver.

NVRTC in the environment names the library of another release, libnvrtc.so.12 for one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import bitnet_ext.gpu
from bitnet_ext.gpu.compile import Module, build

SOURCES = Path(bitnet_ext.gpu.__path__[0])
CACHE = Path(__file__).parents[1] / "build" / "cuda"
_MAX_THREADS, _SIZED = 0x05, 0x04  # an attribute of a kernel, and the form of those with a size


@dataclass
class Usage:
    """What ptxas reports of one kernel."""

    symbol: str  # its mangled name
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared: int
    most_threads: int  # of a block, by __launch_bounds__


@dataclass
class Compiled:
    """Machine code of one module for one architecture."""

    cubin: bytes
    log: str
    usage: dict[str, Usage]  # by name expression


def missing() -> str | None:
    """Why nothing can be compiled here; None where it can."""
    try:
        _library()
        _disassembler()
    except FileNotFoundError as error:
        return f"needs {error}, of the test extra"
    return None


def options_for(arch: str) -> tuple[str, ...]:
    """What a device of that architecture compiles with."""
    return "-std=c++17", "-fmad=false", f"-arch=sm_{arch}"


def compile_module(module: Module, arch: str) -> Compiled:
    """Compile for ``arch`` as a device would; kept in build/cuda by content."""
    options = [*options_for(arch), "--ptxas-options=-v"]
    text = json.dumps([module.source(), module.kernels, options, Nvrtc().getVersion()])
    path = CACHE / f"{Path(module.file).stem}-sm_{arch}-{_digest(text)}"
    if not path.with_suffix(".json").exists():
        cubin, names, log = build(Nvrtc(), module, options)
        CACHE.mkdir(parents=True, exist_ok=True)
        _write(path.with_suffix(".cubin"), cubin)
        _write(path.with_suffix(".json"), json.dumps([log, names]).encode())
    log, names = json.loads(path.with_suffix(".json").read_text())
    cubin = path.with_suffix(".cubin").read_bytes()
    return Compiled(cubin, log, _usage(log, names, _most_threads(cubin)))


def compile_ahead(cases: Sequence[tuple[str, str]]) -> subprocess.Popen[bytes]:
    """A process that compiles (file, architecture) after (file, architecture) into build/cuda.

    From the last on, so that it meets tests that go through them from the first.
    """
    script = (
        "import json, os, sys, nvrtc; from bitnet_ext.gpu.compile import modules; os.nice(10); "
        "of = {module.file: module for module in modules()}; "
        "[nvrtc.compile_module(of[file], arch) for file, arch in json.loads(sys.argv[1])]"
    )
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(cases[::-1])],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )


def disassemble(cubin: bytes) -> dict[str, list[str]]:
    """The instructions of each function of a cubin, by mangled name."""
    path = CACHE / f"{_digest(cubin.hex())}.sass"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        image = path.with_suffix(f".{os.getpid()}")
        image.write_bytes(cubin)
        done = subprocess.run(
            [_disassembler(), "-c", image], check=True, capture_output=True, text=True
        )
        image.unlink()
        _write(path, done.stdout.encode())
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in path.read_text().splitlines():
        if head := re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line):
            current = functions.setdefault(head[1], [])
        elif code := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", line):
            current.append(code[1])
    return functions


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def _write(path: Path, data: bytes) -> None:
    """All or nothing, as several processes may share the folder."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


def _file(pattern: str, package: str) -> Path:
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(place).glob(pattern)):
            return path
    raise FileNotFoundError(package)


def _disassembler() -> Path:
    return _file("cu*/bin/nvdisasm", "nvidia-cuda-nvdisasm")


@functools.lru_cache
def _library() -> ctypes.CDLL:
    given = os.environ.get("NVRTC")
    path = Path(given) if given else _file("cu1?/lib/libnvrtc.so.*", "nvidia-cuda-nvrtc")
    for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


class Nvrtc:
    """What the package uses of ``cupy.cuda.nvrtc``, by the same names."""

    class NVRTCError(RuntimeError):
        """A call failed."""

    def _call(self, name: str, *args: object) -> None:
        if status := getattr(_library(), f"nvrtc{name}")(*args):
            raise self.NVRTCError(f"nvrtc{name}: {status}")

    def getVersion(self) -> tuple[int, int]:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("Version", ctypes.byref(major), ctypes.byref(minor))
        return major.value, minor.value

    def getSupportedArchs(self) -> tuple[int, ...]:
        count = ctypes.c_int()
        self._call("GetNumSupportedArchs", ctypes.byref(count))
        archs = (ctypes.c_int * count.value)()
        self._call("GetSupportedArchs", archs)
        return tuple(archs)

    def createProgram(
        self, source: str, name: str, headers: tuple[()], names: tuple[()]
    ) -> ctypes.c_void_p:
        program = ctypes.c_void_p()
        text = source.encode()
        self._call("CreateProgram", ctypes.byref(program), text, name.encode(), 0, None, None)
        return program

    def destroyProgram(self, program: ctypes.c_void_p) -> None:
        self._call("DestroyProgram", ctypes.byref(program))

    def addNameExpression(self, program: ctypes.c_void_p, name: str) -> None:
        self._call("AddNameExpression", program, name.encode())

    def compileProgram(self, program: ctypes.c_void_p, options: Sequence[str]) -> None:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        self._call("CompileProgram", program, len(options), words)

    def getLoweredName(self, program: ctypes.c_void_p, name: str) -> str:
        lowered = ctypes.c_char_p()
        self._call("GetLoweredName", program, name.encode(), ctypes.byref(lowered))
        assert lowered.value is not None
        return lowered.value.decode()

    def getCUBIN(self, program: ctypes.c_void_p) -> bytes:
        return self._output(program, "CUBIN")

    def getPTX(self, program: ctypes.c_void_p) -> str:
        return self._output(program, "PTX").decode().rstrip("\0")

    def getProgramLog(self, program: ctypes.c_void_p) -> str:
        return self._output(program, "ProgramLog").decode().rstrip("\0")

    def _output(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"Get{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"Get{what}", program, data)
        return data.raw


def _most_threads(cubin: bytes) -> dict[str, int]:
    """The bound of each kernel, by mangled name: MAX_THREADS in the .nv.info section of it."""
    [table] = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, begin, length in sections:
        at = sections[names][4] + name
        title = cubin[at : cubin.index(b"\0", at)].decode()
        at = begin
        while title.startswith(".nv.info.") and at < begin + length:
            form, attribute, value = struct.unpack_from("<BBH", cubin, at)
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<III", cubin, at + 4)
                found[title.removeprefix(".nv.info.")] = x * y * z
            at += 4 + (value if form == _SIZED else 0)
    return found


def _usage(log: str, names: dict[str, str], threads: dict[str, int]) -> dict[str, Usage]:
    """From ptxas' lines on each kernel: properties of, stack and spills, registers."""
    kernels = {mangled: kernel for kernel, mangled in names.items()}
    pattern = (
        r"Compiling entry function '(\w+)' for .*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    )
    found = {}
    for mangled, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        static = int(shared[1]) if shared else 0
        found[kernels[mangled]] = Usage(
            mangled, int(registers), spills, int(stack), static, threads.get(mangled, 1024)
        )
    assert found.keys() == names.keys(), log
    return found
