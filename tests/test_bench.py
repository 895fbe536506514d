"""The benches of bench/ check before they time, and say what they could not do."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import bitnet_ext as bx

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def bench(monkeypatch):
    """Loads a module of bench/; bench/gpu has some of the same names."""
    monkeypatch.syspath_prepend(str(BENCH))  # for what they import of each other

    def load(name):
        spec = importlib.util.spec_from_file_location(f"cpu_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(params=["forward_full", "prefill", "decode"])
def wrong(request, monkeypatch):
    """One of the ways to logits gives other bits."""
    right = getattr(bx.BitNetModel, request.param)
    monkeypatch.setattr(
        bx.BitNetModel, request.param, lambda *given, **options: right(*given, **options) + 1
    )


@pytest.fixture
def small(monkeypatch):
    """The benches' model has the tiny shape."""
    tiny = bx.BitNetConfig.tiny()
    monkeypatch.setattr(bx.BitNetConfig, "bitnet_2b_4t", lambda: tiny)
    monkeypatch.setattr(sys, "argv", ["bench", "--repeats", "1"])


@pytest.mark.parametrize("name", ["bench_overhead", "bench_scaling"])
def test_a_bench_of_wrong_logits_times_nothing(name, bench, wrong, small, capsys):
    with pytest.raises(AssertionError, match="Arrays are not equal"):
        bench(name).main()
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["bench_overhead", "bench_scaling"])
def test_a_bench_of_right_logits_runs(name, bench, small, capsys):
    before = bx.get_num_threads()
    try:
        bench(name).main()
    finally:
        bx.set_num_threads(before)
    assert capsys.readouterr().out


def test_products_have_ragged_rows_and_the_shapes_of_both_presets(bench, monkeypatch):
    ternary = bench("bench_ternary")
    assert ternary.SHAPES == {
        "qkv": (3840, 2560),
        "o": (2560, 2560),
        "gate_up": (13824, 2560),
        "down": (2560, 6912),
    }
    assert ternary.ALL_SHAPES["gpt2 qkv"] == (2304, 768)
    assert ternary.ALL_SHAPES["gpt2 gate_up"] == (3072, 768)
    found = []
    monkeypatch.setattr(ternary, "Limits", lambda threads: SimpleNamespace(threads=threads))
    monkeypatch.setattr(ternary.Bench, "gemm", lambda self, *given: found.append(given))
    monkeypatch.setattr(ternary.Bench, "stream", lambda self, *given: None)
    monkeypatch.setattr(sys, "argv", ["bench"])
    ternary.main()
    assert {("o", 37, "2"), ("down", 1000, "2"), ("gpt2 o", 300, "2"), ("o", 512, "1.6")} < {*found}
    assert len(found) == len({*found})
