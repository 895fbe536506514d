"""The benches of bench/ check before they time, and say what they could not do."""

import importlib.machinery
import importlib.util
import json
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
        path = BENCH / name if name in ("all", "check") else BENCH / f"{name}.py"
        loader = importlib.machinery.SourceFileLoader(f"cpu_{name}", str(path))
        spec = importlib.util.spec_from_loader(loader.name, loader)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture(autouse=True)
def restored():
    before = bx.get_isa(), bx.get_num_threads()
    yield
    bx.set_isa(before[0])
    bx.set_num_threads(before[1])


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
    bench(name).main()
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


# --- peers that are absent ---------------------------------------------------------------------

NO_PEER = 3


@pytest.fixture
def alone(monkeypatch):
    """No peer can be imported."""
    for name in ("torch", "litespark_inference", "llama_cpp"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in ("peers.litespark", "peers.llama_cpp"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def run(module, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench", *arguments])
    return module.main()


def test_the_bench_of_peers_claims_nothing_without_them(bench, alone, monkeypatch, tmp_path):
    path = tmp_path / "peers.json"
    assert (
        run(bench("bench_peers"), monkeypatch, "--preset", "tiny", "--json", str(path)) == NO_PEER
    )
    found = json.loads(path.read_text())
    assert found["absent"] == ["litespark-inference", "llama-cpp-python", "torch"]
    assert found["results"] == []


def test_the_bench_of_attention_does_not_start_without_torch(bench, alone):
    with pytest.raises(SystemExit) as caught:
        bench("bench_attention")
    assert caught.value.code == NO_PEER


def test_the_bench_of_masks_leaves_torch_out(bench, alone, monkeypatch, tmp_path):
    path = tmp_path / "masks.json"
    module = bench("bench_masks")
    assert run(module, monkeypatch, "--sides", "64", "--json", str(path)) == NO_PEER
    found = json.loads(path.read_text())
    assert found["machine"]["torch"] is None
    assert "over_torch" not in found["results"][0]


# --- all of them --------------------------------------------------------------------------------


def test_every_file_of_the_cpu_is_written_in_one_run(bench):
    files = {path.stem for path in (BENCH / "results").glob("*.json")}
    measured_elsewhere = {"memory", *(name for name in files if name.startswith("gpu_"))}
    assert files - measured_elsewhere <= set(bench("all").RUNS)


@pytest.mark.parametrize(
    ("status", "writes", "kept", "text", "code"),
    [
        (0, True, "new", "passed", 0),
        (NO_PEER, True, "new", "no peer", NO_PEER),
        (NO_PEER, False, None, "no peer", NO_PEER),
        (1, True, "old", "failed", 1),
        (1, False, "old", "failed", 1),
    ],
)
def test_what_becomes_of_a_file(
    bench, monkeypatch, tmp_path, capsys, status, writes, kept, text, code
):
    module = bench("all")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    (tmp_path / "masks.json").write_text("old")
    (tmp_path / "masks.new").write_text("of a run that was cut off")
    drawn = []

    def start(command, **options):
        if command[-2] != "--json":
            drawn.append(command)
        elif writes:
            Path(command[-1]).write_text("new")
        return SimpleNamespace(returncode=status)

    monkeypatch.setattr(module.subprocess, "run", start)
    assert run(module, monkeypatch, "--only", "masks") == code
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == ({} if kept is None else {"masks.json": kept})
    assert drawn
    assert ("masks: " + text in capsys.readouterr().err) == (code != 0)


@pytest.mark.parametrize(("rate", "status"), [(0.7, 0), (0.3, 1)])
def test_the_guard_writes_every_isa_and_finds_slow_kernels(
    bench, monkeypatch, tmp_path, capsys, rate, status
):
    module = bench("check")
    isas = bx.available_isas()[:2]
    committed, path = tmp_path / "committed.json", tmp_path / "fresh.json"
    committed.write_text(json.dumps({isas[-1]: {"ratios": {"kernel": 0.8}}}))
    monkeypatch.setattr(module, "COMMITTED", committed)
    monkeypatch.setattr(module, "SECONDS", 0)
    monkeypatch.setattr(module, "Limits", lambda threads: None)
    monkeypatch.setattr(module, "KERNELS", {"kernel": lambda _: (lambda: rate, lambda: 1.0)})
    assert run(module, monkeypatch, "--isa", *isas, "--json", str(path)) == status
    found = json.loads(path.read_text())
    assert list(found) == isas
    assert all(found[isa]["ratios"] == {"kernel": rate} for isa in isas)
    assert (f"{isas[-1]} kernel" in capsys.readouterr().err) == bool(status)
