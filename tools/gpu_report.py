"""Registers, shared memory and machine instructions of every CUDA kernel, without a GPU.

Usage: PYTHONPATH=.:tests python tools/gpu_report.py [architecture ...]
"""

import sys
from collections import Counter

import nvrtc

from bitnet_ext.gpu.compile import modules

ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
MATRIX = ("IMMA", "IGMMA", "HMMA", "HGMMA")


def main() -> None:
    print(
        f"{'sm':>4} {'registers':>9} {'spills':>6} {'static':>6} {'code':>5} {'matrix':>14}  kernel"
    )
    for arch in sys.argv[1:] or ARCHITECTURES:
        for module in modules():
            if module.arch not in (None, f"sm_{arch}"):
                continue
            compiled = nvrtc.compile_module(module, arch)
            code = nvrtc.disassemble(compiled.cubin)
            for kernel, row in compiled.usage.items():
                words = code[row.symbol]
                found = Counter(word.split(".")[0] for word in words)
                matrix = " ".join(f"{found[name]} {name}" for name in MATRIX if found[name])
                print(
                    f"{arch:>4} {row.registers:9} {row.spill_bytes:6} {row.static_shared:6} "
                    f"{len(words):5} {matrix:>14}  {module.file}: {kernel}"
                )


if __name__ == "__main__":
    main()
