"""Every kernel as machine code of every architecture, from NVRTC on PyPI: no GPU, no driver."""

import re

import nvrtc
import pytest
from cuda_emulator.probe import PROBE, PROBE_HOPPER

from bitnet_ext.gpu import compile as compiler
from bitnet_ext.gpu.compile import Module, build, machine_code, modules, source

ARCHITECTURES = ["80", "86", "89", "90a", "100", "120"]
MODULES = {module.file: module for module in modules()}
CASES = [
    (file, arch)
    for file, module in MODULES.items()
    for arch in ARCHITECTURES
    if module.arch in (None, f"sm_{arch}")
]

# Blocks that a multiprocessor should hold, of as many threads as their bounds say.
RESIDENT = {
    "arrange": 6,
    "attend_half": 2,
    "attend_rows": 2,
    "attention": 2,
    "attention_backward": 2,
    "attention_half": 2,
    "attention_int8": 2,
    "norm_gemv": 2,
    "norm_quantise": 6,
    "norm_rows": 4,
    "rotate_heads": 4,
    "ternary_gemm": 3,
    "ternary_gemv": 2,
}

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))


@pytest.mark.parametrize(("file", "arch"), CASES, ids=str)
def test_compiles_without_spills(file, arch):
    compiled = nvrtc.compile_module(MODULES[file], arch)
    assert "Performance Loss" not in compiled.log
    assert set(compiled.usage) == set(MODULES[file].kernels)
    for kernel, usage in compiled.usage.items():
        assert usage.spill_bytes == 0, (kernel, usage)
        assert usage.stack_bytes == 0, (kernel, usage)
        blocks = RESIDENT.get(kernel.partition("<")[0], 1)
        assert -(-usage.registers // 8) * 8 * usage.most_threads * blocks <= 65536, (kernel, usage)


@pytest.mark.parametrize(
    ("file", "arch"), [case for case in CASES if case[0].startswith("ternary")], ids=str
)
def test_ternary_products_use_integer_matrix_instructions(file, arch):
    code = nvrtc.disassemble(nvrtc.compile_module(MODULES[file], arch).cubin)
    hopper = MODULES[file].arch is not None
    wanted = "IGMMA.64x128x32.U8.S8" if hopper else "IMMA.16832.U8.S8"
    for kernel, instructions in code.items():
        assert wanted in instructions, kernel


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_int8_attention_uses_matrix_instructions(arch):
    compiled = nvrtc.compile_module(MODULES["attention_int8.cu"], arch)
    code = nvrtc.disassemble(compiled.cubin)
    kernels = [u for kernel, u in compiled.usage.items() if kernel.startswith("attention")]
    assert len(kernels) == 8
    for usage in kernels:
        assert "IMMA.16832.S8.S8" in code[usage.symbol]
        assert any(word.startswith("HMMA.16816.F32") for word in code[usage.symbol])
    compiled = nvrtc.compile_module(MODULES["attention.cu"], arch)
    code = nvrtc.disassemble(compiled.cubin)
    for kernel, usage in compiled.usage.items():
        assert ("IMMA.16832.S8.S8" in code[usage.symbol]) == kernel.startswith("attention")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_screen_uses_integer_matrix_instructions(arch):
    compiled = nvrtc.compile_module(MODULES["screen.cu"], arch)
    code = nvrtc.disassemble(compiled.cubin)
    bounds = [usage for kernel, usage in compiled.usage.items() if "screen_bound" in kernel]
    assert len(bounds) == 4
    for usage in bounds:
        assert "IMMA.16832.U8.S8" in code[usage.symbol]


@pytest.mark.parametrize(
    "file", ["quantise.cu", "ternary_gemv.cu", "ternary_gemm.cu", "ternary_wgmma.cu"]
)
def test_what_has_the_cpus_bits_keeps_subnormals(file):
    """However it is compiled."""
    arch = (MODULES[file].arch or "sm_80").replace("sm", "compute")
    options = ["-std=c++17", "-ftz=true", f"-arch={arch}"]
    text = build(nvrtc.Nvrtc(), MODULES[file], options)[0].decode()
    assert "div.rn.f32" in text
    arithmetic = r"^\s*((?:add|sub|mul|fma|mad|div|sqrt|min|max|cvt)\.\S*ftz\S*)"
    assert re.findall(arithmetic, text, re.MULTILINE) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_card_builds_what_is_tested(arch, tmp_path, monkeypatch):
    seen = []

    def build(nvrtc, module, options):
        seen.append(options)
        return b"", {}, ""

    monkeypatch.setattr(compiler, "build", build)
    machine_code(nvrtc.Nvrtc(), MODULES["mask.cu"], int(arch.rstrip("a")), tmp_path)
    assert seen == [nvrtc.options_for(arch)]


def test_machine_code_is_made_once(tmp_path):
    module = MODULES["mask.cu"]
    tools = nvrtc.Nvrtc()
    path, names = machine_code(tools, module, 80, tmp_path)
    assert path.read_bytes()[:4] == b"\x7fELF"
    assert set(names) == set(module.kernels)
    tools.compileProgram = None  # another compilation would fail
    assert machine_code(tools, module, 80, tmp_path) == (path, names)
    assert machine_code(nvrtc.Nvrtc(), module, 86, tmp_path)[0] != path
    assert len(list(tmp_path.iterdir())) == 4


def test_a_device_newer_than_the_compiler_gets_ptx(tmp_path):
    path, _ = machine_code(nvrtc.Nvrtc(), MODULES["mask.cu"], 999, tmp_path)
    newest = max(nvrtc.Nvrtc().getSupportedArchs())
    assert f".target sm_{newest}" in path.read_text()


def test_an_error_of_the_compiler_is_shown(tmp_path):
    module = Module("mask.cu", ["no_such_kernel"])
    with pytest.raises(RuntimeError, match=r"(?s)mask.cu: .*-arch=sm_80.*no_such_kernel"):
        machine_code(nvrtc.Nvrtc(), module, 80, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("arch", ["80", "90a", "120"])
def test_the_instructions_that_are_emulated_assemble(arch):
    code = nvrtc.disassemble(nvrtc.compile_module(PROBE, arch).cubin)
    words = " ".join(word for instructions in code.values() for word in instructions)
    for instruction in ("IMMA.16832.U8.S8", "HMMA.16816.F32.BF16", "LDSM", "LDGSTS", "SHFL"):
        assert instruction in words
    if arch == "90a":
        code = nvrtc.disassemble(nvrtc.compile_module(PROBE_HOPPER, arch).cubin)
        words = " ".join(word for instructions in code.values() for word in instructions)
        assert "IGMMA.64x128x32.U8.S8" in words
        assert "UBLKCP" in words


def test_resident_kernels_are_there():
    assert RESIDENT.keys() <= {k.partition("<")[0] for m in MODULES.values() for k in m.kernels}


def test_every_source_has_a_launcher():
    sources = {path.name for path in nvrtc.SOURCES.glob("*.cu")}
    assert sources == set(MODULES)


def test_headers_come_once():
    text = source("mask.cu")
    assert text.count("struct half_t") == 1
    assert "#include" not in text
