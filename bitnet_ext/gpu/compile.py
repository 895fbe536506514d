"""CUDA modules: sources shipped beside their launchers, compiled on first use, kept on disk.

A launcher names its source file and the kernels in it, as C++ expressions::

    MODULE = Module("mask.cu", ["fill_rows<uint32_t>", ...])

NVRTC is called as CuPy wraps it, but not through ``RawModule(code=...)``: that appends
``-ftz=true`` and ``-arch=sm_90``, which take the place of ours, and Hopper's matrix instructions
need ``sm_90a``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import bitnet_ext.gpu

__all__ = ["Module", "build", "machine_code", "modules", "source"]

_OPTIONS = ("-std=c++17", "-fmad=false")  # no contraction of a * b + c
_INCLUDE = re.compile(r'#include "([\w.]+)"')


class Module:
    """One ``.cu`` file and the kernels that its launcher calls.

    Attributes:
        file: name of the source in ``bitnet_ext/gpu``.
        kernels: C++ expressions that name its ``__global__`` functions.
        arch: "sm_90a" for instructions that only such devices have; None: every device from
            compute capability 8.0 on.
        folder: where the source lies; None: among the package's.
    """

    def __init__(
        self,
        file: str,
        kernels: Sequence[str],
        arch: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.file = file
        self.kernels = tuple(kernels)
        self.arch = arch
        self.folder = folder

    def source(self, replacements: dict[str, str] | None = None) -> str:
        """The whole source, headers included; ``replacements`` as :func:`source` takes them."""
        own = {} if self.folder is None else {self.file: (self.folder / self.file).read_text()}
        return source(self.file, own | (replacements or {}))


def machine_code(
    nvrtc: Any, module: Module, capability: int, folder: Path
) -> tuple[Path, dict[str, str]]:
    """The file with ``module``'s code for a device, and its kernels' names in there.

    The file is made on the first call, in ``folder``, under a name that stands for all that it
    comes from.

    Args:
        nvrtc: CuPy's wrapper of NVRTC.
        capability: compute capability times ten.
    """
    arch = module.arch or _architecture(capability, nvrtc.getSupportedArchs())
    options = (*_OPTIONS, f"-arch={arch}")
    sources = [module.source(), module.kernels, options, nvrtc.getVersion()]
    key = hashlib.sha256(json.dumps(sources).encode()).hexdigest()
    path = folder / f"bitnet_ext-{Path(module.file).stem}-{key[:32]}.bin"
    names = path.with_suffix(".json")
    if not path.exists():
        code, mangled, _ = build(nvrtc, module, options)
        folder.mkdir(parents=True, exist_ok=True)
        _write(names, json.dumps(mangled).encode())
        _write(path, code)
    found: dict[str, str] = json.loads(names.read_text())
    return path, found


def build(nvrtc: Any, module: Module, options: Sequence[str]) -> tuple[bytes, dict[str, str], str]:
    """(machine code or PTX, names of the kernels in it, the compiler's log).

    Raises:
        RuntimeError: the compiler refused; the message is its log.
    """
    program = nvrtc.createProgram(module.source(), module.file, (), ())
    try:
        for kernel in module.kernels:
            nvrtc.addNameExpression(program, kernel)
        try:
            nvrtc.compileProgram(program, options)
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{module.file}: {' '.join(options)}: {error}\n{log}") from error
        names = {kernel: nvrtc.getLoweredName(program, kernel) for kernel in module.kernels}
        virtual = any(option.startswith("-arch=compute") for option in options)
        code = nvrtc.getPTX(program).encode() if virtual else nvrtc.getCUBIN(program)
        return code, names, nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def _architecture(capability: int, supported: Iterable[int]) -> str:
    """A device's own architecture, or the newest before it, which its driver translates."""
    best = max(arch for arch in supported if arch <= capability)
    if best < capability:
        return f"compute_{best}"
    return "sm_90a" if best == 90 else f"sm_{best}"  # Hopper's: one for every module


def _write(path: Path, data: bytes) -> None:
    """All or nothing, as several processes may share the folder."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


def modules() -> list[Module]:
    """The modules of every launcher of the package, which it imports."""
    launchers = [
        importlib.import_module(f"bitnet_ext.gpu.{part.name}")
        for part in pkgutil.iter_modules(bitnet_ext.gpu.__path__)
    ]
    found = {
        value: None
        for launcher in launchers
        for value in vars(launcher).values()
        if isinstance(value, Module)
    }
    return list(found)


def source(file: str, replacements: dict[str, str] | None = None) -> str:
    """``file`` with each header that it includes put in its place, once.

    Args:
        file: name of a source in ``bitnet_ext/gpu``.
        replacements: texts of headers that stand for those of the same name.
    """
    from importlib import resources  # only those who compile need it

    seen: set[str] = set()

    def lines(name: str) -> Iterator[str]:
        seen.add(name)
        text = (replacements or {}).get(name)
        if text is None:
            text = resources.files(bitnet_ext.gpu).joinpath(name).read_text()
        yield f'#line 1 "{name}"'
        for number, line in enumerate(text.splitlines(), 1):
            include = _INCLUDE.fullmatch(line)
            if include is None:
                yield line
            elif include[1] not in seen:
                yield from lines(include[1])
                yield f'#line {number + 1} "{name}"'
            else:
                yield ""

    return "\n".join(lines(file)) + "\n"
