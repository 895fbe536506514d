"""CUDA modules: sources shipped beside their launchers, compiled on first use, warmed on request.

A launcher names its source file and the kernels in it, as C++ expressions::

    MODULE = Module("mask.cu", ["fill_rows<uint32_t>", ...])

CuPy compiles it with NVRTC and keeps the machine code in its cache on disk, keyed by the source;
so headers are put into the source, not left to the include path.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator, Sequence

import bitnet_ext.gpu

__all__ = ["Module", "modules", "source"]

# No contraction of a * b + c.  CuPy appends -ftz=true, which no option undoes: where a subnormal
# matters, kernels use the instructions of ptx.cuh, which keep it.
_OPTIONS = ("-std=c++17", "-fmad=false")

_INCLUDE = re.compile(r'#include "([\w.]+)"')


class Module:
    """One ``.cu`` file and the kernels that its launcher calls.

    Attributes:
        file: name of the source in ``bitnet_ext/gpu``.
        kernels: C++ expressions that name its ``__global__`` functions.
        arch: "sm_90a" for instructions that only such devices have; None: every device from
            compute capability 8.0 on.
        options: of the compiler.
    """

    def __init__(self, file: str, kernels: Sequence[str], arch: str | None = None) -> None:
        self.file = file
        self.kernels = tuple(kernels)
        self.arch = arch
        self.options = _OPTIONS if arch is None else (*_OPTIONS, f"-arch={arch}")

    def source(self) -> str:
        """The whole source, headers included."""
        return source(self.file)


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
