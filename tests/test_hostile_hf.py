"""Hostile Hugging Face directories: CheckpointError each, no crash, bounded memory."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import load_fully, refused
from make_checkpoints import make_hf

Header = dict[str, Any]
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf(tmp_path_factory.mktemp("sound"), "bitnet", layers=1).path


@pytest.fixture
def model(tmp_path: Path, sound: Path) -> Path:
    """A sound checkpoint to damage."""
    return Path(shutil.copytree(sound, tmp_path / "m"))


def split(path: Path) -> tuple[Header, bytes]:
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def join(path: Path, header: bytes | Header, data: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if size is None else size).to_bytes(8, "little") + text + data)


def change(model: Path, edit: Callable[[Header], Any]) -> None:
    """Rewrite the header; the data stays."""
    header, data = split(model / "model.safetensors")
    edit(header)
    join(model / "model.safetensors", header, data)


def poke(model: Path, tensor: str, data: bytes, at: int = 0) -> None:
    """Overwrite bytes of a tensor."""
    header, raw = split(model / "model.safetensors")
    start = header[tensor]["data_offsets"][0] + at
    assert start + len(data) <= header[tensor]["data_offsets"][1]
    join(model / "model.safetensors", header, raw[:start] + data + raw[start + len(data) :])


def set_config(model: Path, **changes: Any) -> None:
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# safetensors


def test_truncated_everywhere(model: Path) -> None:
    path = model / "model.safetensors"
    raw = path.read_bytes()
    header, _ = split(path)
    size = len(raw) - max(e["data_offsets"][1] for e in header.values() if "dtype" in e)
    ends = {size + e["data_offsets"][1] for e in header.values() if "dtype" in e}
    cuts = {*range(0, 12), *range(12, size, 97), size - 1, size, *ends, *(e - 1 for e in ends)}
    for cut in sorted(cuts - {len(raw)}):
        path.write_bytes(raw[:cut])
        refused(model, r"model\.safetensors")
    path.write_bytes(raw + b"\0")
    refused(model, "tensors end at byte")


@pytest.mark.parametrize("size", [0, 1, 1 << 20, 1 << 31, 1 << 62, (1 << 64) - 1])
def test_header_length_lies(model: Path, size: int) -> None:
    header, data = split(model / "model.safetensors")
    join(model / "model.safetensors", header, data, size)
    refused(model, "header")


def nested(depth: int) -> bytes:
    return b'{"a":' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (b"not json", "is not JSON"),
        (b"[1, 2]", "wanted an object"),
        (b'{"a": \xff\xfe}', "is not UTF-8"),
        (b'{"a": 1' + b"0" * 6000 + b"}", "an integer of 6001 digits"),
        (b'{"a": NaN}', "found NaN"),
        (b'{"a": {}, "a": {}}', "stands twice"),
        (nested(100_000), "nested too deep|wanted exactly"),
        (nested(500_000), "brackets"),
        (b"{" + b" " * (1 << 20) + b"}", "missing|no tensor|tensors end"),
        (b'{"a": {"dtype": "F32"}}', "wanted exactly"),
        (b'{"a": 3}', "wanted exactly"),
    ],
)
def test_header_text_lies(model: Path, header: bytes, match: str) -> None:
    _, data = split(model / "model.safetensors")
    join(model / "model.safetensors", header, data)
    refused(model, match)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("shape", [64, 1 << 62], "wanted"),
        ("shape", [1 << 63, 1 << 63, 1 << 63], "wanted"),
        ("shape", [-64, -256], "found shape"),
        ("shape", [64.0, 256], "found shape"),
        ("shape", [True, 256], "found shape"),
        ("shape", [[64], 256], "found shape"),
        ("shape", [1] * 5000, "found shape"),
        ("shape", "64", "found shape"),
        ("shape", [256, 64], r"found U8 \[256, 64\]"),
        ("shape", [16384], r"found U8 \[16384\]"),
        ("dtype", "U9", "found dtype"),
        ("dtype", 8, "found dtype"),
        ("dtype", "I8", r"found I8 \[64, 256\]"),
        ("dtype", "BOOL", r"found BOOL \[64, 256\]"),
        ("dtype", "F32", "found 16384 bytes, wanted 65536"),
        ("data_offsets", [0, 1 << 63], "found 9223372036854775808 bytes"),
        ("data_offsets", [-16384, 0], "data_offsets"),
        ("data_offsets", [1 << 70, 1 << 71], "digits|bytes"),
        ("data_offsets", [0], "data_offsets"),
        ("data_offsets", [0, 16384], "a hole or an overlap"),
    ],
)
def test_entries_lie(model: Path, field: str, value: Any, match: str) -> None:
    change(model, lambda h: h[Q].__setitem__(field, value))
    refused(model, match)


def test_missing_and_misnamed_tensors(model: Path) -> None:
    original = (model / "model.safetensors").read_bytes()
    names = [n for n in split(model / "model.safetensors")[0] if n != "__metadata__"]
    for name in names:
        change(model, lambda h, n=name: h.__setitem__("other", h.pop(n)))
        refused(model, name.replace(".", r"\."))
        (model / "model.safetensors").write_bytes(original)


def test_a_hundred_thousand_tensors(model: Path) -> None:
    header = ",".join(f'"t{i}":{{}}' for i in range(100_001))
    join(model / "model.safetensors", f"{{{header}}}".encode(), b"")
    with pytest.raises(ValueError, match="found 100001 tensors"):
        load_fully(model)


def test_a_small_tensor_is_read_where_it_stands_crooked(tmp_path: Path) -> None:
    """An odd header length leaves every tensor misaligned: still the same values."""
    made = make_hf(tmp_path, "bitnet", layers=1)
    path = tmp_path / "model.safetensors"
    header, data = split(path)
    text = json.dumps(header).encode()
    join(path, text + b" " * ((1 - len(text)) % 8), data)
    checkpoint = load_fully(tmp_path)
    assert checkpoint.ternary("layers.0.q").scale == made.scales["layers.0.q"]
    assert np.array_equal(checkpoint.dense("final_norm.weight"), made.dense["final_norm.weight"])


# Values


@pytest.mark.parametrize("bits", [0x7FC0, 0xFFC0, 0x7F80, 0xFF80, 0x0000, 0x8000, 0xBF80])
def test_scales_that_are_no_positive_number(model: Path, bits: int) -> None:
    """bf16: NaN, -NaN, inf, -inf, 0, -0, -1."""
    poke(model, f"{Q}_scale", bits.to_bytes(2, "little"))
    refused(model, r"q_proj\.weight_scale: found the scale")


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_norms_that_are_not_finite(model: Path, bits: int) -> None:
    poke(model, "model.norm.weight", bits.to_bytes(2, "little"), at=6)
    refused(model, r"model\.norm\.weight: found .* at 3, wanted finite")


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_code_three(model: Path, shift: int) -> None:
    poke(model, Q, bytes([3 << shift]), at=16383)
    refused(model, r"layers\.0\.q|q_proj")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_latent_weights_that_are_not_finite(tmp_path: Path, value: float, dtype: str) -> None:
    make_hf(tmp_path, "bitnet-bf16", dtype=dtype, layers=1)
    raw = np.array([value], np.float16 if dtype == "f16" else np.float32).tobytes()
    poke(tmp_path, Q, raw[2:] if dtype == "bf16" else raw, at=64 * len(raw))
    refused(tmp_path, r"layers\.0\.q|q_proj")


# The index


def shards(tmp_path: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    model = make_hf(tmp_path / "m", "bitnet", layers=1, shards=2).path
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))
    return model


@pytest.mark.parametrize(
    "name",
    [
        "../other.safetensors",
        "/etc/passwd.safetensors",
        "a/b.safetensors",
        "..\\x.safetensors",
        "x\0.safetensors",
        "",
        "..",
        "config.json",
        "model.bin",
        "none.safetensors",
        "x" * 5000 + ".safetensors",
        7,
        None,
        ["model.safetensors"],
    ],
)
def test_path_tricks_in_the_index(tmp_path: Path, name: Any) -> None:
    (tmp_path / "other.safetensors").write_bytes(b"secret")
    model = shards(tmp_path, lambda i: i["weight_map"].__setitem__(Q, name))
    refused(model, r"plain name|wanted a \.safetensors file|cannot be|links cannot")


def test_an_index_that_contradicts_its_files(tmp_path: Path) -> None:
    model = shards(tmp_path / "a", lambda i: i["weight_map"].__setitem__("ghost", "x.safetensors"))
    refused(model, "x.safetensors: cannot be read")
    model = shards(tmp_path / "b", lambda i: i["weight_map"].pop(Q))
    refused(model, "is not in the index")
    model = shards(
        tmp_path / "c",
        lambda i: i["weight_map"].__setitem__(
            Q,
            "model-00002-of-00002.safetensors"
            if "00001" in i["weight_map"][Q]
            else "model-00001-of-00002.safetensors",
        ),
    )
    refused(model, "is not in 'model-0000")
    for i, value in enumerate([{}, [], 3, None]):
        model = shards(tmp_path / f"d{i}", lambda x, v=value: x.__setitem__("weight_map", v))
        refused(model, "wanted an object 'weight_map'")


def test_links_out_of_the_directory(tmp_path: Path, model: Path) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        file = model / name
        outside = tmp_path / f"outside-{name}"
        file.rename(outside)
        file.symlink_to(outside)
        refused(model, "is a link to .*, wanted a file inside", tokenizer=True)
        file.unlink()
        outside.rename(file)
    inside = model / "real.safetensors"
    (model / "model.safetensors").rename(inside)
    (model / "model.safetensors").symlink_to(inside)
    load_fully(model)


def test_things_that_are_not_files(tmp_path: Path, model: Path) -> None:
    file = model / "model.safetensors"
    file.unlink()
    os.mkfifo(file)
    refused(model, "wanted a regular file")
    file.unlink()
    file.mkdir()
    refused(model, "wanted a regular file")
    file.rmdir()
    file.symlink_to(file)
    refused(model, "links cannot be followed|cannot be read")
    file.unlink()
    file.symlink_to("/dev/zero")
    refused(model, "is a link to /dev/zero")


# config.json and the tokenizer's files


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("hidden_size", [0, -1, 1 << 31, 1 << 63, 256.0, "256", [256], True, 255, 512]),
        ("num_hidden_layers", [0, -1, 2, 1 << 29, 1 << 40, 1.5]),
        ("num_attention_heads", [0, 3, 1 << 20, -4, "4"]),
        ("num_key_value_heads", [0, 3, 8, -1, 1 << 30]),
        ("head_dim", [0, 63, 32, 1 << 30, -64]),
        ("vocab_size", [0, 321, 1 << 30, -1]),
        ("intermediate_size", [0, 767, 1 << 30]),
        ("max_position_embeddings", [0, -1, 1 << 25, 1e4]),
        ("rms_norm_eps", [0, -1e-5, 2, "1e-5", 1e-300]),
        ("rope_theta", [0, -1, 0.5, 1e300, [1]]),
        ("rope_scaling", [3, "llama3", {"type": "linear"}, {"type": "linear", "factor": 0}]),
        ("rope_scaling", [{"type": ["linear"]}, {"type": "x" * 100000}]),
        ("tie_word_embeddings", [1, "true", False]),
        ("attention_bias", [1, True]),
        ("eos_token_id", ["</s>", [1, "2"], 1.5, [[1]], list(range(5000)), 1 << 62]),
        ("architectures", ["BitNetForCausalLM", [1], {"a": 1}]),
        ("hidden_act", [1, "swiglu", None, ["silu"]][:2]),
        (
            "quantization_config",
            [
                1,
                [],
                {"quant_method": 1},
                {"quant_method": "bitnet", "linear_class": "x"},
                {"quant_method": "bitnet", "quantization_mode": 2},
            ],
        ),
    ],
)
def test_config_lies(model: Path, key: str, values: list[Any]) -> None:
    for value in values:
        set_config(model, **{key: json.loads(json.dumps(value))})
        refused(model, r"config\.json|tensor")


def test_config_numbers_that_are_none(model: Path) -> None:
    text = (model / "config.json").read_text()
    for number in ("NaN", "Infinity", "1e999", "-1e999", "9" * 4000):
        (model / "config.json").write_text(text.replace("1e-05", number))
        refused(model, r"config\.json")


@pytest.mark.parametrize(
    "patterns", [["(a+)+$" * 40], [".*" * 50 + "x"], ["x" * 100000], [3], "lm_head", {"a": 1}]
)
def test_unconverted_modules_lie(model: Path, patterns: Any) -> None:
    section = {"quant_method": "bitnet", "modules_to_not_convert": patterns}
    section["linear_class"] = "autobitlinear"
    set_config(model, quantization_config=section)
    refused(model, r"config\.json|modules_to_not_convert")


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"\xff\xfe{}", b'{"a":' * 5000, b'{"a": 1, "a": 2}', b"null"]
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer.json"])
def test_json_that_is_none(model: Path, name: str, text: bytes) -> None:
    (model / name).write_bytes(text)
    refused(model, name.replace(".", r"\."), tokenizer=True)


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: t.__setitem__("model", None),
        lambda t: t["model"].__setitem__("type", "Pickle"),
        lambda t: t["model"].__setitem__("vocab", {"a": -1}),
        lambda t: t["model"].__setitem__("vocab", {"a": 1 << 40}),
        lambda t: t["model"].__setitem__("merges", [["a", "not there"]]),
        lambda t: t["model"].__setitem__("merges", 7),
        lambda t: t.__setitem__("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}}),
        lambda t: t.__setitem__("decoder", {"type": "None such"}),
        lambda t: t.__setitem__("added_tokens", [{"id": "x"}]),
    ],
)
def test_tokenizer_lies(model: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = model / "tokenizer.json"
    value = json.loads(path.read_text())
    edit(value)
    path.write_text(json.dumps(value))
    refused(model, r"tokenizer\.json", tokenizer=True)
