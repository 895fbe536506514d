"""A forced ISA runs or fails, it never falls back; nothing above the CPU's level is offered."""

import os
import platform
import shutil
import sys

import fresh
import pytest
from everywhere import FLOAT_TABLES

import bitnet_ext as bx

ALL = ["scalar", "avx2", "avxvnni", "avxvnni_evex", "avx512", "avx512vnni", "amx_int8"]
ABSENT = [name for name in ALL if name not in bx.available_isas()]
GET_ISA = "import bitnet_ext as bx; print(bx.get_isa())"


def test_available_isas_are_known_and_ascending() -> None:
    available = bx.available_isas()
    assert available[0] == "scalar"
    assert available == [name for name in ALL if name in available]


@pytest.mark.skipif(platform.machine() != "x86_64", reason="scalar kernels only")
def test_isas_are_those_of_the_cpu_flags() -> None:
    """The operating system's reading of CPUID and XGETBV against ours."""
    with open("/proc/cpuinfo") as file:
        flags = set(next((s for s in file if s.startswith("flags")), "").split())
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    needs = {
        "avx2": avx2,
        "avxvnni": avx2 | {"avx_vnni"},
        "avxvnni_evex": avx512 | {"avx512_vnni"},
        "avx512": avx512,
        "avx512vnni": avx512 | {"avx512_vnni"},
        "amx_int8": avx512 | {"avx512_vnni", "amx_tile", "amx_int8"},
    }
    assert bx.available_isas()[1:] == [name for name, need in needs.items() if need <= flags]


def test_set_isa_takes_effect(isa: str) -> None:
    assert bx.get_isa() == isa
    info = bx.dispatch_info()
    assert info["ternary"]["current"] == isa
    for concept in ("screen", "attention_int8"):
        assert info[concept]["current"] == ("avx512vnni" if isa == "amx_int8" else isa)
    for concept in ("rowwise", "vocab", "attention"):
        assert info[concept]["current"] == FLOAT_TABLES.get(isa, isa)
    assert all(row["available"] == bx.available_isas() for row in info.values())


def test_auto_is_the_best(isa: str) -> None:
    bx.set_isa("auto")
    assert bx.get_isa() == bx.available_isas()[-1]


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx2 "])
def test_unknown_isa_fails_and_changes_nothing(name: str, isa: str) -> None:
    with pytest.raises(RuntimeError, match=f"unknown ISA '{name}'; available: auto, scalar"):
        bx.set_isa(name)
    assert bx.get_isa() == isa


@pytest.mark.skipif(not ABSENT, reason="this CPU runs every ISA")
@pytest.mark.parametrize("name", ABSENT)
def test_absent_isa_fails_and_changes_nothing(name: str, isa: str) -> None:
    with pytest.raises(RuntimeError, match=f"ISA '{name}' is not available on this CPU"):
        bx.set_isa(name)
    assert bx.get_isa() == isa
    done = fresh.run(GET_ISA, BITNET_ISA=name)
    assert done.returncode != 0
    assert f"ISA '{name}' is not available on this CPU" in done.stderr


@pytest.mark.parametrize("name", bx.available_isas())
def test_environment_forces_an_isa(name: str) -> None:
    assert fresh.output(GET_ISA, BITNET_ISA=name) == name


@pytest.mark.parametrize("value", ["", "auto"])
def test_environment_without_a_choice(value: str) -> None:
    assert fresh.output(GET_ISA, BITNET_ISA=value) == bx.available_isas()[-1]


def test_unknown_isa_in_the_environment_fails() -> None:
    done = fresh.run(GET_ISA, BITNET_ISA="sse9")
    assert done.returncode != 0
    assert "RuntimeError: unknown ISA 'sse9'" in done.stderr


def test_unknown_isa_has_no_description() -> None:
    from bitnet_ext import _core

    assert all(_core.isa_description(name) for name in ALL)
    with pytest.raises(RuntimeError, match="unknown ISA 'sse9'"):
        _core.isa_description("sse9")


def test_show_config_names_the_isa(isa: str, capsys: pytest.CaptureFixture[str]) -> None:
    bx.show_config()
    printed = dict(line.split(None, 1) for line in capsys.readouterr().out.splitlines())
    assert printed["isa"].startswith(f"{isa} (")
    assert printed["python"] == sys.version.split()[0]
    assert printed["bitnet_ext"] == bx.__version__
    assert printed["available"] == ", ".join(bx.available_isas())


@pytest.mark.skipif(
    not (shutil.which("qemu-x86_64") and os.environ.get("EMULATE")),
    reason="slow: set EMULATE=1 and install qemu-user",
)
@pytest.mark.parametrize(
    ("cpu", "isas"), [("Nehalem", ["scalar"]), ("Haswell", ["scalar", "avx2"])]
)
def test_lesser_cpus_give_the_same_bits(cpu: str, isas: list[str]) -> None:
    """An emulated CPU without the newer instructions dies of SIGILL if one of them executes."""
    code = (
        "import hashlib\n"
        "import bitnet_ext as bx\n"
        "model = bx.BitNetModel.random(bx.BitNetConfig.tiny(), seed=5)\n"
        "cache = model.new_cache()\n"
        "digest = hashlib.sha256(model.forward_full(list(range(70))).tobytes())\n"
        "digest.update(model.prefill(list(range(40)), cache).tobytes())\n"
        "digest.update(model.decode([7], cache).tobytes())\n"
        "print(bx.available_isas(), digest.hexdigest())\n"
    )
    found = fresh.output(code, emulator=("qemu-x86_64", "-cpu", cpu))
    wanted = fresh.output(code, BITNET_ISA="scalar").split()[-1]
    assert found == f"{isas} {wanted}"
