"""The benches of bench/gpu on the emulated device: each runs, checks, and writes what is judged."""

import dataclasses
import importlib.machinery
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import nvrtc
import pytest
from cuda_emulator import emulator

import bitnet_ext.gpu.device
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import CudaDevice

BENCH = Path(__file__).parents[1] / "bench" / "gpu"
NAMES = sorted(path.stem for path in BENCH.glob("bench_*.py"))


@pytest.fixture
def bench(monkeypatch):
    """Loads a module of bench/gpu; bench/ has some of the same names."""
    monkeypatch.syspath_prepend(str(BENCH))  # for what they import of each other

    def load(name):
        spec = importlib.util.spec_from_file_location(f"gpu_{name}", BENCH / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look themselves up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(emulator.missing() is not None, reason=str(emulator.missing()))
def test_a_bench_runs_and_writes_its_rows(bench, name, tmp_path, capsys, monkeypatch):
    device = emulator.EmulatedDevice(90)
    monkeypatch.setattr(bitnet_ext.gpu.device, "cuda_device", lambda: device)
    monkeypatch.setenv("COMMIT", "abc")
    path = tmp_path / "found.json"
    status = bench(name).main(["--smoke", "--json", str(path)])
    found = json.loads(path.read_text())
    assert status == (bench("harness").NO_PEER if found["absent"] else 0)
    assert found["machine"]["card"] == "emulated"
    assert found["machine"]["smoke"]
    assert found["machine"]["commit"] == "abc"
    assert found["results"]
    assert all(row.get("us", 1) > 0 for row in found["results"])
    assert min(found["limits"].values()) > 0
    text = capsys.readouterr().out
    assert found["results"][0]["name"] in text
    assert all(peer in text for peer in found["absent"])


def test_every_bench_is_run_and_shown(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH.parents[1] / "tools"))
    monkeypatch.syspath_prepend(str(BENCH.parent))
    monkeypatch.syspath_prepend(str(BENCH))
    loader = importlib.machinery.SourceFileLoader("all_of_gpu", str(BENCH / "all"))
    everything = importlib.util.module_from_spec(
        importlib.util.spec_from_loader("all_of_gpu", loader)
    )
    loader.exec_module(everything)
    stems = [name.removeprefix("bench_") for name in NAMES]
    assert sorted(everything.BENCHES) == stems
    assert sorted(importlib.import_module("draw_gpu").BENCHES) == stems


def test_events_time_a_card(bench, monkeypatch):
    """The clock's calls of CuPy, against a stand-in."""
    harness, asked = bench("harness"), []

    class Event:
        def record(self):
            asked.append("record")

        def synchronize(self):
            asked.append("synchronize")

    cuda = SimpleNamespace(Event=Event, get_elapsed_time=lambda start, end: 1.5)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    clock = harness.Clock(CudaDevice.__new__(CudaDevice))
    assert clock.seconds(lambda: asked.append("work")) == pytest.approx(1.5e-3)
    assert asked == ["record", "work", "record", "synchronize"]


def test_turns_divide_by_their_amounts_and_add_up(bench):
    harness = bench("harness")
    both = harness.Turn("a", 2.0, harness.Turn("b", 4.0))
    assert both.seconds({"a": 10.0, "b": 8.0}.get) == 7.0
    times = harness.Times([{"kernel": 1.0, "peer": 3.0}, {"kernel": 2.0, "peer": 2.0}])
    assert times.median("kernel") == 1.5
    assert times.ratio("peer", "kernel") == 2.0
    assert "peer" in times
    assert "limit" not in times


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
def test_the_limits_compile(bench):
    [usage] = nvrtc.compile_module(bench("harness").LIMITS, "90a").usage.values()
    assert usage.spill_bytes == 0


def test_a_measured_table_is_taken_into_the_package(bench, tmp_path, monkeypatch):
    module = bench("bench_dispatch")
    found = dataclasses.asdict(dispatch.table()) | {"measured": {"card": "a card"}, "margin": 1.25}
    (tmp_path / "found.json").write_text(json.dumps({"table": found, "results": []}))
    monkeypatch.setattr(module, "TABLE", tmp_path / "dispatch.json")
    assert module.main(["--take", str(tmp_path / "found.json")]) == 0
    taken = dispatch.Table.of(json.loads((tmp_path / "dispatch.json").read_text()))
    assert taken == dataclasses.replace(dispatch.table(), measured={"card": "a card"}, margin=1.25)
