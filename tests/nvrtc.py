"""NVRTC and nvdisasm from PyPI through ctypes: real machine code without a GPU or a driver."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import bitnet_ext.gpu
from bitnet_ext.gpu.compile import Module

SOURCES = Path(bitnet_ext.gpu.__path__[0])
CACHE = Path(__file__).parents[1] / "build" / "cuda"


@dataclass
class Usage:
    """What ptxas reports of one kernel."""

    symbol: str  # its mangled name
    registers: int
    spill_bytes: int
    stack_bytes: int
    static_shared: int


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


def compile_module(module: Module, arch: str) -> Compiled:
    """Compile as CuPy does on a device of ``arch``; kept in build/cuda by content."""
    options = [*module.options, "-ftz=true", f"-arch=sm_{arch}", "--ptxas-options=-v"]
    source = module.source()
    text = json.dumps([source, module.kernels, options, _version()])
    path = CACHE / f"{Path(module.file).stem}-sm_{arch}-{_digest(text)}"
    if not path.with_suffix(".json").exists():
        cubin, log, names = _compile(source, module.kernels, options)
        CACHE.mkdir(parents=True, exist_ok=True)
        _write(path.with_suffix(".cubin"), cubin)
        _write(path.with_suffix(".json"), json.dumps([log, names]).encode())
    log, names = json.loads(path.with_suffix(".json").read_text())
    return Compiled(path.with_suffix(".cubin").read_bytes(), log, _usage(log, names))


def ptx(module: Module) -> str:
    """The PTX of ``module``, compiled as CuPy does."""
    arch = (module.arch or "sm_80").replace("sm", "compute")
    options = [*module.options, "-ftz=true", f"-arch={arch}"]
    return _compile(module.source(), module.kernels, options, "PTX")[0].decode()


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


def _library() -> ctypes.CDLL:
    folder = _file("cu*/lib/libnvrtc.so.*", "nvidia-cuda-nvrtc").parent
    for builtins in folder.glob("libnvrtc-builtins.so.*"):
        ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(next(folder.glob("libnvrtc.so.*"))))


def _version() -> list[int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return [major.value, minor.value]


def _compile(
    source: str, names: tuple[str, ...], options: list[str], kind: str = "CUBIN"
) -> tuple[bytes, str, dict[str, str]]:
    """(cubin or PTX, log, mangled name -> name expression)."""
    nvrtc = _library()
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"module.cu", 0, None, None)
    try:
        for name in names:
            nvrtc.nvrtcAddNameExpression(program, name.encode())
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        failed = nvrtc.nvrtcCompileProgram(program, len(options), words)
        log = _output(nvrtc, program, "ProgramLog").decode().rstrip("\0")
        if failed:
            raise RuntimeError(f"{names[0]}: {' '.join(options)}\n{log}")
        lowered = ctypes.c_char_p()
        mangled = {}
        for name in names:
            nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(lowered))
            assert lowered.value is not None
            mangled[lowered.value.decode()] = name
        return _output(nvrtc, program, kind), log, mangled
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _output(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    data = ctypes.create_string_buffer(size.value)
    getattr(nvrtc, f"nvrtcGet{what}")(program, data)
    return data.raw


def _usage(log: str, names: dict[str, str]) -> dict[str, Usage]:
    """From ptxas' lines on each kernel: properties of, stack and spills, registers."""
    pattern = (
        r"Compiling entry function '(\w+)' for .*?(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers(.*?)\n"
    )
    found = {}
    for mangled, stack, stores, loads, registers, rest in re.findall(pattern, log, re.DOTALL):
        shared = re.search(r"(\d+) bytes smem", rest)
        spills = int(stores) + int(loads)
        static = int(shared[1]) if shared else 0
        found[names[mangled]] = Usage(mangled, int(registers), spills, int(stack), static)
    assert found.keys() == set(names.values()), log
    return found
