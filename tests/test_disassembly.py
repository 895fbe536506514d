"""Each kernel object holds only instructions of its level, and exports nothing but its table.

The assembler is the judge: what objdump prints must assemble again for a CPU with exactly the
level's features. The encoding is checked beside it, as text does not always tell VEX from EVEX.
"""

import platform
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
AVX2 = "+avx2+fma+f16c"
AVX512 = AVX2 + "+avx512f+avx512bw+avx512vl+avx512dq"
# What csrc/base/cpu.cpp asks the processor for, in the assembler's words; endbr64 (ibt) is a nop
# on a CPU that does not know it.
LEVELS = {
    "scalar": "",
    "avx2": AVX2,
    "avxvnni": AVX2 + "+avx_vnni",
    "avxvnni_evex": AVX512 + "+avx512_vnni",
    "avx512": AVX512,
    "avx512vnni": AVX512 + "+avx512_vnni",
    "amx_int8": AVX512 + "+avx512_vnni+amx_tile+amx_int8",
}
VEX, EVEX = {0xC4, 0xC5}, {0x62}  # first byte of an instruction in 64-bit mode
FORBIDDEN_BYTES = {"scalar": VEX | EVEX, "avx2": EVEX, "avxvnni": EVEX}
LIBC = {"memcpy", "memset", "memmove", "memcmp", "fmaf", "_GLOBAL_OFFSET_TABLE_"}

pytestmark = pytest.mark.skipif(
    platform.machine() != "x86_64"
    or not all(shutil.which(tool) for tool in ("objdump", "as", "nm", "g++")),
    reason="needs g++ and binutils for x86-64",
)


def kernels() -> list[tuple[str, str]]:
    """(concept, ISA) of every kernel file for this machine's architecture."""
    found = [(p.parent.name, p.stem) for p in (ROOT / "csrc").glob("*/*.cpp") if p.stem in LEVELS]
    return sorted(found)


def cmake_flags() -> dict[str, list[str]]:
    """The flags that CMakeLists.txt gives each ISA."""
    flags: dict[str, list[str]] = {}
    text = (ROOT / "CMakeLists.txt").read_text()
    for isa, words in re.findall(r"set\(ISA_FLAGS_(\w+) ([^)]*)\)", text):
        flags[isa] = []
        for word in words.replace('"', "").split():
            known = re.fullmatch(r"\$\{ISA_FLAGS_(\w+)\}", word)
            flags[isa] += flags[known[1]] if known else [word]
    return flags


def with_headers(path: Path) -> set[Path]:
    """A source file and what it includes of ours."""
    found = {path}
    for name in re.findall(r'#include "([^"]+)"', path.read_text()):
        found |= with_headers(ROOT / "csrc" / name)
    return found


def built_object(concept: str, isa: str) -> Path | None:
    """The newest object of a plain build in this checkout, unless a source is newer than it."""
    sources = with_headers(ROOT / "csrc" / concept / f"{isa}.cpp")
    newest = max(p.stat().st_mtime for p in sources)
    configured = (ROOT / "CMakeLists.txt").stat().st_mtime
    plain = [
        ninja.parent
        for ninja in ROOT.glob("build/*/build.ninja")
        if ninja.stat().st_mtime > configured
        and not re.search(
            r"BITNET_(SANITIZE|COVERAGE):BOOL=ON", (ninja.parent / "CMakeCache.txt").read_text()
        )
    ]
    name = f"CMakeFiles/kernel_{concept}_{isa}.dir/csrc/{concept}/{isa}.cpp.o"
    objects = [o for b in plain if (o := b / name).exists() and o.stat().st_mtime > newest]
    return max(objects, key=lambda o: o.stat().st_mtime, default=None)


@cache
def kernel_object(concept: str, isa: str, folder: Path) -> Path:
    """The object that was linked, or one compiled as CMake would."""
    found = built_object(concept, isa)
    if found is None:
        found = folder / f"{concept}_{isa}.o"
        common = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
        source = ROOT / "csrc" / concept / f"{isa}.cpp"
        command = ["g++", *common, "-fno-math-errno", *cmake_flags()[isa], f"-I{ROOT}/csrc"]
        subprocess.run([*command, "-c", source, "-o", found], check=True)
    return found


@pytest.fixture(params=kernels(), ids="-".join)
def kernel(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    concept, isa = request.param
    folder = tmp_path_factory.getbasetemp()
    return concept, isa, kernel_object(concept, isa, folder)


def disassemble(path: Path) -> list[tuple[int, str]]:
    """(first byte, text) of every instruction; the byte is the one after legacy prefixes."""
    done = subprocess.run(
        ["objdump", "-d", "--insn-width=16", path], check=True, capture_output=True, text=True
    )
    found = []
    for line in done.stdout.splitlines():
        match = re.match(r"\s*[0-9a-f]+:\t((?:[0-9a-f]{2} )+)\s*\t(.*)$", line)
        if match:
            code = [int(b, 16) for b in match[1].split()]
            while code[0] in (0x66, 0xF2, 0xF3, 0x2E, 0x3E) and len(code) > 1:
                code = code[1:]
            text = match[2].split("#")[0].split("<")[0].strip()
            # A jump's target is a bare address, which the assembler cannot read.
            found.append((code[0], re.sub(r"^(j\w+|call)\s+[0-9a-f]+$", r"\1 .", text)))
    return found


def inner_loops(path: Path) -> list[list[str]]:
    """The instructions of every loop without another in it: from a backward jump's target on."""
    done = subprocess.run(["objdump", "-d", path], check=True, capture_output=True, text=True)
    loops: list[list[str]] = []
    for function in re.split(r"^[0-9a-f]{16} <", done.stdout, flags=re.M)[1:]:
        code = [
            (int(at, 16), text)
            for at, text in re.findall(r"^ *([0-9a-f]+):\t[^\t\n]*\t(.*)$", function, re.M)
        ]
        start = 0  # of the run since the last backward jump
        for i, (at, text) in enumerate(code):
            jump = re.match(r"j\w+ +([0-9a-f]+)", text)
            if jump and (target := int(jump[1], 16)) <= at:
                first = next((j for j in range(i + 1) if code[j][0] == target), None)
                if first is not None and first >= start:
                    loops.append([t for _, t in code[first : i + 1]])
                start = i + 1
    return loops


def refused(instructions: list[str], level: str) -> list[str]:
    """The instructions that a CPU of the level does not have."""
    # Padding has prefixes that the assembler does not take twice. GCC writes bsf as tzcnt where the
    # operand is not zero: the same bytes on a CPU without BMI run as bsf, to the same result.
    lines = [text for text in instructions if "nop" not in text and not text.startswith("tzcnt")]
    done = subprocess.run(
        ["as", f"-march=generic64+ibt{level}", "-o", "/dev/null", "-"],
        input="\n".join(lines) + "\n",
        capture_output=True,
        text=True,
    )
    return [lines[int(n) - 1] for n in re.findall(r"^[^:\n]*:(\d+): Error", done.stderr, re.M)]


def test_every_isa_of_the_build_has_a_level() -> None:
    assert set(cmake_flags()) == set(LEVELS)
    assert {isa for _, isa in kernels()} == set(LEVELS)


def test_object_holds_only_its_level(kernel: tuple[str, str, Path]) -> None:
    _, isa, path = kernel
    code = disassemble(path)
    assert code
    assert refused(sorted({text for _, text in code}), LEVELS[isa]) == []
    forbidden = FORBIDDEN_BYTES.get(isa, set())
    assert sorted({text for first, text in code if first in forbidden}) == []


def test_object_exports_only_its_table(kernel: tuple[str, str, Path]) -> None:
    concept, isa, path = kernel
    done = subprocess.run(["nm", "-C", path], check=True, capture_output=True, text=True)
    symbols = re.findall(r"^[0-9a-f ]{16} (\w) (.*)$", done.stdout, re.M)
    assert [name for kind, name in symbols if kind in "WwVvu"] == []
    tables = {f"bitnet::{concept}_{isa}"}
    if (concept, isa) == ("ternary", "avx512vnni"):
        tables.add("bitnet::ternary_avx512vnni_mixed")
    assert {name for kind, name in symbols if kind in "TDBRG"} == tables
    assert {name for kind, name in symbols if kind == "U"} <= LIBC


@pytest.mark.parametrize(
    ("isa", "product", "loops"),
    [("avx512vnni", "vpdpbusd", {96, 24}), ("amx_int8", "tdpbsud", {4})],
)
def test_products_of_many_rows_leave_the_stack_alone(
    isa: str, product: str, loops: set[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Innermost loops with these numbers of products, and no sum or operand on the stack."""
    path = kernel_object("ternary", isa, tmp_path_factory.getbasetemp())
    found = [loop for loop in inner_loops(path) if any(product in text for text in loop)]
    sizes = {sum(product in text for text in loop) for loop in found}
    assert loops <= sizes
    for loop in found:
        if sum(product in text for text in loop) in loops:
            assert [text for text in loop if re.search(r"%[re]?[sb]p\b", text)] == []


def test_lookups_stand_beside_dot_products(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """One innermost loop for each storage: 24 dot products, and eight entries of a table."""
    path = kernel_object("ternary", "avx512vnni", tmp_path_factory.getbasetemp())
    counts = [
        tuple(sum(name in text for text in loop) for name in ("vpdpbusd", "vpaddw"))
        for loop in inner_loops(path)
    ]
    assert counts.count((24, 8)) >= 2


@pytest.mark.parametrize(
    ("instruction", "isa"),
    [
        ("pshufb %xmm0,%xmm1", "scalar"),
        ("vaddps %ymm0,%ymm1,%ymm2", "scalar"),
        ("vpaddd %zmm0,%zmm1,%zmm2", "avx2"),
        ("vpaddd %ymm16,%ymm1,%ymm2", "avx2"),
        ("andn %eax,%ebx,%ecx", "avx2"),
        ("{vex} vpdpbusd %ymm0,%ymm1,%ymm2", "avx2"),
        ("vpdpbusd %ymm0,%ymm1,%ymm2{%k1}", "avxvnni"),
        ("vpdpbusd %zmm0,%zmm1,%zmm2", "avx512"),
        ("vpermb %zmm0,%zmm1,%zmm2", "avx512vnni"),
        ("vpopcntd %zmm0,%zmm1", "avx512vnni"),
        ("tilezero %tmm0", "avx512vnni"),
        ("tdpbsud %tmm0,%tmm1,%tmm2", "avx512vnni"),
        ("tdpbf16ps %tmm0,%tmm1,%tmm2", "amx_int8"),
    ],
)
def test_the_judge_refuses(instruction: str, isa: str) -> None:
    assert refused([instruction], LEVELS[isa]) == [instruction]
