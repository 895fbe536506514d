"""Every kernel as machine code of every architecture, from NVRTC on PyPI: no GPU, no driver."""

import re

import nvrtc
import pytest
from cuda_emulator.probe import PROBE

from bitnet_ext.gpu.compile import modules, source

ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
MODULES = {module.file: module for module in modules()}
CASES = [
    (file, arch)
    for file, module in MODULES.items()
    for arch in ARCHITECTURES
    if module.arch in (None, f"sm_{arch}")
]

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


@pytest.mark.parametrize(("file", "arch"), CASES, ids=str)
def test_compiles_without_spills(file, arch):
    compiled = nvrtc.compile_module(MODULES[file], arch)
    assert "Performance Loss" not in compiled.log
    assert set(compiled.usage) == set(MODULES[file].kernels)
    for kernel, usage in compiled.usage.items():
        assert usage.spill_bytes == 0, (kernel, usage)
        assert usage.stack_bytes == 0, (kernel, usage)
        assert usage.registers <= 255, (kernel, usage)
    code = nvrtc.disassemble(compiled.cubin)
    assert len(code) == len(compiled.usage)
    assert all("EXIT" in instructions for instructions in code.values())


@pytest.mark.parametrize(
    ("file", "arch"), [case for case in CASES if case[0].startswith("ternary")], ids=str
)
def test_ternary_products_use_integer_matrix_instructions(file, arch):
    code = nvrtc.disassemble(nvrtc.compile_module(MODULES[file], arch).cubin)
    hopper = MODULES[file].arch is not None
    wanted = "IGMMA.64x128x32.U8.S8" if hopper else "IMMA.16832.U8.S8"
    for kernel, instructions in code.items():
        assert wanted in instructions, kernel


@pytest.mark.parametrize(
    "file", ["quantise.cu", "ternary_gemv.cu", "ternary_gemm.cu", "ternary_wgmma.cu"]
)
def test_what_has_the_cpus_bits_keeps_subnormals(file):
    text = nvrtc.ptx(MODULES[file])
    assert "div.rn.f32" in text
    assert (
        re.findall(r"^\s*((?:add|sub|mul|fma|mad|div|sqrt|min|max|cvt)\S*ftz\S*)", text, re.M) == []
    )


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_instructions_that_are_emulated_assemble(arch):
    code = nvrtc.disassemble(nvrtc.compile_module(PROBE, arch).cubin)
    words = " ".join(word for instructions in code.values() for word in instructions)
    for instruction in ("IMMA.16832.U8.S8", "HMMA.16816.F32.BF16", "LDSM", "LDGSTS", "SHFL"):
        assert instruction in words


def test_every_source_has_a_launcher():
    sources = {path.name for path in nvrtc.SOURCES.glob("*.cu")}
    assert sources == set(MODULES)


def test_headers_come_once():
    text = source("mask.cu")
    assert text.count("struct half_t") == 1
    assert "#include" not in text
