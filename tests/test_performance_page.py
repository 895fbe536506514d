"""docs/performance.md and its picture are what the files in bench/results say."""

import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("draw", ROOT / "tools" / "draw_performance.py")
assert spec is not None
assert spec.loader is not None
draw = importlib.util.module_from_spec(spec)
spec.loader.exec_module(draw)
MODEL = json.loads((ROOT / "bench" / "results" / "model.json").read_text())


def test_page_and_picture_are_up_to_date() -> None:
    assert (ROOT / "docs" / "performance.md").read_text() == draw.page()
    assert (ROOT / "docs" / "roofline.svg").read_text() == draw.draw_roofline.roofline(draw.load)
    picture = ROOT / "docs" / draw.draw_gpu.PICTURE
    found = picture.read_text() if picture.exists() else None
    assert found == draw.draw_gpu.roofline(draw.load)


def test_every_result_of_the_model_is_in_the_table() -> None:
    page = draw.page()
    for row in MODEL["results"]:
        figures = row["tokens_per_second"], row["roofline_tokens_per_second"]
        words = [row["test"], *map(draw.rate, figures), f"{row['ratio']:.0%}"]
        assert f"| {' | '.join(words)} |\n" in page


def test_the_picture_has_a_dot_for_every_test_and_none_above_its_bar() -> None:
    svg = ElementTree.fromstring(draw.draw_roofline.roofline(draw.load))
    space = "{http://www.w3.org/2000/svg}"
    dots = [float(dot.attrib["cy"]) for dot in svg.iter(f"{space}circle")]
    bars = [float(bar.attrib["d"].split("V")[1].split("M")[0]) for bar in svg.iter(f"{space}path")]
    assert len(dots) == len(bars) == len(MODEL["results"])
    for row, dot, bar in zip(MODEL["results"], dots, bars, strict=True):
        assert (dot > bar) == (row["tokens_per_second"] < row["roofline_tokens_per_second"])
    texts = {text.text for text in svg.iter(f"{space}text")}
    assert {row["test"] for row in MODEL["results"]} <= texts


def test_products_stand_where_their_bytes_and_rates_put_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = {"isa": MODEL["machine"]["isa"], "bits": "2", "limit": 1.0, "limit_is": "read"}
    common |= {"ratio": 1.0}
    rows = [
        common | {"name": "stream", "rows": 2, "unit": "GB/s", "rate": 30.0},
        common | {"name": "gemm o", "rows": 512, "unit": "GMAC/s", "rate": 400.0},
        common | {"name": "gemm gpt2 o", "rows": 8, "unit": "GMAC/s", "rate": 90.0},
        common | {"name": "stream", "rows": 1, "unit": "GB/s", "rate": 9.0, "isa": "avx2"},
    ]
    for path in draw.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    file = {"machine": {"cpu": "a CPU", "threads": 2}, "results": rows}
    (tmp_path / "ternary.json").write_text(json.dumps(file))
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    macs = 512 * 2560 * 2560
    found = draw.draw_roofline.product_points(draw.load, common["isa"])
    assert [point[1:] for point in found] == [
        (8.0, 240.0),
        (macs / (2560 * 2560 / 4 + 512 * 2560 + 4 * 512 * 2560), 400.0),
        (8 * 768 / (768 / 4 + 8 + 4 * 8), 90.0),
    ]
    assert all(
        f"<title>{name}</title>" in draw.draw_roofline.roofline(draw.load) for name, *_ in found
    )
    assert "| stream | 1 | 2 | avx2 | 9.0 GB/s | 1.0 (read) | 100% |" in draw.page()


def test_a_change_of_a_file_changes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = draw.page()
    for path in draw.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    changed = json.loads(json.dumps(MODEL))
    changed["results"][0]["tokens_per_second"] *= 0.5
    (tmp_path / "model.json").write_text(json.dumps(changed))
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    assert draw.page() != before


def test_targets_are_judged_by_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = MODEL["machine"]
    greedy = {"test": "gr0", "tokens_per_second": 40.0, "read_gb_per_second": 32.0, "ratio": 0.5}
    gemm = {"isa": machine["isa"], "bits": "2", "limit_is": "peak", "unit": "GMAC/s"}
    files = {
        "model": [
            greedy,
            greedy | {"test": "gc0", "tokens_per_second": 44.0},
            greedy | {"test": "pp512", "ratio": 0.64},
        ],
        "overhead": [{"name": "overhead tiny", "us_per_layer": 29.5}],
        "ternary": [
            {"name": "stream", "rows": 1, "isa": machine["isa"], "bits": bits, "rate": rate}
            for bits, rate in (("2", 20.0), ("1.6", 18.0))
        ]
        + [
            gemm | {"name": "gemm o", "rows": 128, "ratio": 0.9},
            gemm | {"name": "gemm o", "rows": 1000, "ratio": 0.8},
            gemm | {"name": "gemm o", "rows": 37, "ratio": 0.3},
            gemm | {"name": "gemm gpt2 o", "rows": 300, "ratio": 0.6},
        ],
        "peers": [
            {"peer": "litespark-inference 1", "test": "pp512", "ratio": 9.0, "correlation": 0.5},
            {"peer": "torch 1", "test": "gemm o", "ratio": 1.4, "threads": 2},
            {"peer": "torch 1", "test": "gemm o", "ratio": 0.9, "threads": 1},
        ],
        "attention": [
            {"name": "self causal int8", "dim": dim, "k_len": 2048, "ratio": ratio}
            for dim, ratio in ((64, 1.9), (128, 2.1))
        ],
        "c": [
            {"name": f"mask/kernel/{side}", "beside": "fresh_loop", "ratio": ratio}
            for side, ratio in ((64, 5.5), (1024, 4.0))
        ],
        "scaling": [
            {"tokens": n, "us_per_token": 100.0, "ratio": ratio}
            for n, ratio in ((128, 1.04), (256, 1))
        ],
    }
    for name, rows in files.items():
        text = json.dumps({"machine": machine, "results": rows})
        (tmp_path / f"{name}.json").write_text(text)
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    found = {what: text for what, _, text in draw.rows_of(draw.load)}
    assert found["greedy decode, random weights, tokens/s for 20 GB/s"] == "25.00"
    assert found["prefill of 512, of the roofline"] == "64%, missed"
    assert found["decode outside kernels, a layer of a tiny model"] == "29.50 us"
    assert found["ternary GEMM, 128 rows and more, of the dot product's peak"] == "80%"
    assert found["ternary GEMM in GPT-2 small's shapes, of the peak"] == "60%, missed"
    assert found["its weights a second with 1.6 bits over 2"] == "1.12x"
    assert found["prefill of 512, over litespark"] == "not measured"
    assert found["prefill of 512, over ik_llama.cpp"] == "no claim: not on PyPI"
    assert found["greedy decode, over ik_llama.cpp"] == "no claim: not on PyPI"
    assert found["the same, 512 rows, over torch's dense int8"] == "1.40x"
    assert found["the same with one thread"] == "0.90x, missed"
    assert found["the same with a trained head"] == "27.50, missed"
    assert found["the same with int8 scores"] == "1.90x, missed"
    assert found["masks of side 64 to 512 over the loop they replace, in C"] == "5.50x"
    assert found["time of a token outside attention, 128 to 8192 tokens, spread"] == "4%"


def test_what_absent_peers_leave_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in draw.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "attention.json").unlink()
    masks = json.loads((tmp_path / "masks.json").read_text())
    for row in masks["results"]:
        del row["over_torch"]
    (tmp_path / "masks.json").write_text(json.dumps(masks))
    peers = {"machine": MODEL["machine"], "absent": ["torch", "a-peer"], "results": []}
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    page = draw.page()
    assert "Not there, and nothing is claimed of them: torch, a-peer.\n" in page
    assert "scaled_dot_product_attention" not in page
    found = {what: text for what, _, text in draw.rows_of(draw.load)}
    assert found["prefill of 512, over llama.cpp"] == "not measured"
    assert found["causal attention over torch, 512 keys"] == "not measured"


def test_full_sequences_are_shown_over_both_kinds_of_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in draw.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    row = {"test": "seed128x8", "full_ms": 100.0, "loop_ms": 900.0, "wanted": 5.0}
    row |= {"ratio": 9.0, "roofline_ratio": 8.0}
    steps = {"full_part": 0.8, "loop_part": 0.7, "steps_part": 0.6, "steps_ms": 200.0}
    steps |= {"steps_ratio": 2.0, "steps_roofline_ratio": 1.5}
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    for more, wanted in (
        ({}, "| 128x8 | 100 | 900 | 9.0 | 8.0 |\n"),
        (steps, "| 128x8 | 100 (80%) | 900 (70%) | 9.0 | 8.0 | 200 (60%) | 2.0 | 1.5 |\n"),
    ):
        file = {"machine": MODEL["machine"], "results": [row | more]}
        (tmp_path / "seed_table.json").write_text(json.dumps(file))
        assert wanted in draw.page()


def test_products_are_shown_with_their_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in draw.RESULTS.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    peer = {"peer": "torch 1", "test": "gemm o", "unit": "GMAC/s", "ours": 200, "theirs": 100}
    rows = [peer | {"ratio": 2.0, "threads": threads} for threads in (2, 1)]
    file = {"machine": MODEL["machine"], "results": rows}
    (tmp_path / "peers.json").write_text(json.dumps(file))
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    page = draw.page()
    assert "| torch 1 | gemm o | 200 | 100 | GMAC/s | 2.00 |" in page
    assert "| torch 1 | gemm o, 1 thread | 200 | 100 | GMAC/s | 2.00 |" in page


def gpu_files(tmp_path: Path) -> None:
    """One row of each kind that a target of the GPU asks for."""
    machine = {"card": "a card", "driver": "1", "date": "today", "commit": "abc", "smoke": False}
    gemm = {"name": "gemm o", "rows": 2048, "us": 10.0, "limit": "int8 rate", "of_limit": 0.6}
    flash = {"name": "prefill f16", "length": 2048, "us": 5.0, "over": {"torch flash": 1.25}}
    mask = {"name": "causal mask", "side": 8192, "dtype": "float32", "us": 1.0, "of_limit": 0.85}
    files = {
        "ternary": [
            gemm | {"tops": 1000.0, "macs_per_byte": 1500.0, "over": {"torch int8": 1.5}},
            gemm | {"rows": 512, "of_limit": 0.2, "tops": 10.0, "macs_per_byte": 900.0, "over": {}},
        ],
        "attention": [flash, flash | {"length": 512, "over": {"torch flash": 0.5}}],
        "masks": [mask | {"limit": "copy", "over": {"this CPU": 30.0}}],
        "model": [{"name": "pp8192", "tokens": 8192, "us": 80_000.0}],
        "seed_table": [
            {"name": f"seed{n}", "full_ms": 4.0, "wanted_ms": ms, "ratio": 9.0, "wanted": 6}
            for n, ms in (("128x1", 8), ("512x4", None))
        ],
        "memory": [
            {"name": "forward_full gpt2_medium", "of_estimate": 1.1, "mb": 2.0},
            *({"name": "attention beside its arrays", "kv_heads": n, "mb": 0.0} for n in (16, 1)),
        ],
        "check": [{"name": "hot path", "result": "failed (1)", "seconds": 3}],
    }
    for name, rows in files.items():
        data = {"machine": machine, "limits": {"read_bytes_per_second": 4e12}, "results": rows}
        (tmp_path / f"gpu_{name}.json").write_text(json.dumps(data))


def nothing_has_run() -> None:
    """Every target is on the page, and none with a figure."""
    [section] = draw.draw_gpu.sections(draw.load)
    assert "have not run on a GPU yet" in section
    for target in draw.draw_gpu.GPU_TARGETS:
        assert re.search(rf"^\| {re.escape(target.what)} \| [^|]+ \| not run \|$", section, re.M)
    assert draw.draw_gpu.roofline(draw.load) is None


def test_a_gpu_is_shown_and_judged_where_there_are_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    nothing_has_run()
    gpu_files(tmp_path)
    found = {what: text for what, _, text in draw.rows_of(draw.load, draw.draw_gpu.GPU_TARGETS)}
    assert found["ternary GEMM from 2048 rows, of the int8 rate"] == "60%, missed"
    assert found["ternary GEMM from 2048 rows, over `torch._int_mm`"] == "1.50x"
    assert found["half-precision attention from 2048 tokens, over FlashAttention 2"] == "1.25x"
    assert found["the same over cuDNN"] == "not measured"
    assert found["masks of side 8192 and more, of the copy bandwidth"] == "85%"
    assert found["masks of side 2048 and more, over this CPU"] == "30.00x"
    assert found["prefill of 8192"] == "80.00 ms, missed"
    assert found["`forward_full` (GPT-2 small), of the milliseconds wanted"] == "0.50x"
    assert found["the same over single steps, of what is wanted"] == "1.50x"
    assert found["decode of one, of reading its bytes"] == "not measured"
    assert found["attention's own memory with shared keys and values, of that without"] == "1.00x"
    hot = "transfers and allocations in the hot path (1: a test of it failed)"
    assert found[hot] == "1.00, missed"
    page = "\n".join(draw.draw_gpu.sections(draw.load))
    assert "a card, driver 1, today, commit abc; `bench/gpu/bench_ternary.py`." in page
    assert "| prefill f16 | 512 | 5.0 | 0.50 |" in page
    svg = ElementTree.fromstring(draw.draw_gpu.roofline(draw.load))
    dots = {dot[0].text: float(dot.attrib["cy"]) for dot in svg.iter() if "r" in dot.attrib}
    assert dots["gemm o, 2048 rows"] < dots["gemm o, 512 rows"]


def test_files_of_tiny_shapes_are_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_files(tmp_path)
    for path in tmp_path.iterdir():
        path.write_text(path.read_text().replace('"smoke": false', '"smoke": true'))
    monkeypatch.setattr(draw, "RESULTS", tmp_path)
    nothing_has_run()
