"""Hugging Face directories: published headers at full size, configurations, the hub, pickles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import FAMILIES, LATENT, layout, make_hf
from published import PUBLISHED
from reference_formats import from_bf16, to_bf16

from bitnet_ext import BitNetConfig
from bitnet_ext.checkpoint import open_checkpoint
from bitnet_ext.checkpoint.safetensors import DTYPE_BITS, SafetensorsFile, write_safetensors
from bitnet_ext.config import RopeScaling
from bitnet_ext.errors import CheckpointError, UnsupportedModelError


def full_header(family: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> dtype and shape of every tensor of the published checkpoint."""
    config = PUBLISHED[family]
    dense = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}[
        config.get("torch_dtype") or config["dtype"]
    ]
    header: dict[str, tuple[str, tuple[int, ...]]] = {}
    for _, name, shape, kind in layout(family, config):
        if kind != "linear":
            header[name] = (dense, shape)
        elif family in LATENT:
            header[f"{name}.weight"] = (dense, shape)
        else:
            header[f"{name}.weight"] = ("U8", (shape[0] // 4, shape[1]))
            header[f"{name}.weight_scale"] = (dense, (1,))
    return header


def sparse(directory: Path, header: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """A file of the full size that takes no room: the data is a hole."""
    entries, offset = {}, 0
    for name, (dtype, shape) in header.items():
        size = int(np.prod(shape)) * DTYPE_BITS[dtype] // 8
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(entries).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("family", FAMILIES)
def test_published_headers_open_at_full_size(tmp_path: Path, family: str) -> None:
    header = full_header(family)
    sparse(tmp_path, header)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family]))
    checkpoint = open_checkpoint(tmp_path)
    raw, config = PUBLISHED[family], checkpoint.config
    assert config.vocab_size == raw["vocab_size"]
    assert config.intermediate_size == raw["intermediate_size"]
    assert config.num_layers == raw["num_layers" if family == "gpt2" else "num_hidden_layers"]
    assert {n: (d, s) for n, d, s in checkpoint.tensors()} == header
    last = config.num_layers - 1
    assert checkpoint.has(f"layers.{last}.down")
    if family not in LATENT:
        with pytest.raises(CheckpointError, match=r"weight_scale: found the scale 0\.0"):
            checkpoint.ternary(f"layers.{last}.down")
    if family.startswith("bitnet"):
        assert config == BitNetConfig.bitnet_2b_4t()
        assert len(header) == 332 + (210 if family == "bitnet" else 0)
    if family == "gpt2":
        assert config == BitNetConfig.gpt2_small()


# Header and bytes against the safetensors package.


def test_reads_what_the_safetensors_package_writes(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    rng = np.random.default_rng(3)
    arrays: dict[str, Any] = {
        "u8": rng.integers(0, 256, (3, 5)).astype(np.uint8),
        "i8": rng.integers(-128, 128, 7).astype(np.int8),
        "f32": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "f16": rng.normal(size=(1, 9)).astype(np.float16),
        "f64": rng.normal(size=()).astype(np.float64),
        "i64": rng.integers(-(1 << 60), 1 << 60, 4),
        "empty": np.zeros((0, 3), np.float32),
        "bool": np.array([True, False, True]),
    }
    save_file(arrays, tmp_path / "a.safetensors", metadata={"format": "np"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert set(file.tensors) == set(arrays)
    for name, array in arrays.items():
        got = file.array(name)
        assert got.shape == array.shape
        assert np.array_equal(got, array)


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors import deserialize

    values = np.random.default_rng(4).normal(size=(4, 3)).astype(np.float32)
    bits = to_bf16(values)
    path = tmp_path / "a.safetensors"
    write_safetensors(
        path,
        [
            ("b", "BF16", (4, 3), lambda: bits),
            ("é", "F32", (12,), lambda: values.reshape(-1)),
            ("none", "U8", (0,), lambda: np.zeros(0, np.uint8)),
        ],
    )
    found = dict(deserialize(path.read_bytes()))
    assert found["b"]["dtype"] == "BF16"
    assert found["b"]["shape"] == [4, 3]
    assert bytes(found["b"]["data"]) == bits.tobytes()
    assert bytes(found["é"]["data"]) == values.tobytes()
    assert np.array_equal(from_bf16(SafetensorsFile(path).array("b")), from_bf16(bits))


def test_a_plan_that_lies_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="tensor 'a': found 8 bytes, wanted 12"):
        write_safetensors(
            tmp_path / "x.safetensors", [("a", "F32", (3,), lambda: np.zeros(2, np.float32))]
        )
    assert not any(tmp_path.iterdir())


def test_both_packages_refuse_the_same_headers(tmp_path: Path) -> None:
    """Lies about places, told to both readers."""
    from safetensors import SafetensorError, safe_open

    def entry(dtype: str, shape: list[int], start: int, end: int) -> dict[str, Any]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    cases: list[tuple[dict[str, Any], int]] = [
        ({"a": entry("F32", [2], 0, 8)}, 12),  # bytes left over
        ({"a": entry("F32", [2], 0, 8)}, 4),  # bytes missing
        ({"a": entry("F32", [2], 0, 12)}, 12),  # size and shape differ
        ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, 4),  # shared
        ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, 12),  # overlap
        ({"a": entry("F32", [1], 4, 8)}, 8),  # hole
        ({"a": entry("F31", [1], 0, 4)}, 4),  # unknown dtype
        ({"a": entry("F32", [-1], 0, 4)}, 4),  # negative extent
        ({"a": entry("F32", [1 << 62, 8], 0, 0)}, 0),  # product past 64 bits
        ({"a": entry("F32", [1], 4, 0)}, 4),  # backwards
    ]
    path = tmp_path / "a.safetensors"
    for header, size in cases:
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size))
        with pytest.raises(SafetensorError), safe_open(path, "np"):
            pass
        with pytest.raises(CheckpointError, match=r"tensor|wanted"):
            SafetensorsFile(path)


# Configurations.


def test_old_and_new_rope_keys(tmp_path: Path) -> None:
    scaling = {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 256,
    }
    wanted = RopeScaling("llama3", 8.0, 1.0, 4.0, 256)
    for i, changes in enumerate(
        [
            {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **scaling}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **scaling}},
            {
                "rope_theta": None,
                "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling},
            },
        ]
    ):
        make_hf(tmp_path / str(i), "llama3", **changes)
        config = open_checkpoint(tmp_path / str(i)).config
        assert (config.rope_theta, config.rope_scaling) == (5e5, wanted)


def test_stop_ids_of_both_files(tmp_path: Path) -> None:
    make_hf(tmp_path, "llama3", eos_token_id=7)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [8, 7, 9], "top_k": 5}')
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.config.eos_token_ids == (7, 8, 9)
    assert checkpoint.generation_config["top_k"] == 5


DENSE = {"quantization_config": {"quant_method": "bitnet", "modules_to_not_convert": ["q_proj"]}}


@pytest.mark.parametrize(
    ("family", "changes", "match"),
    [
        ("llama3", {"quantization_config": None}, "no quantization_config"),
        ("llama3", {"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
        ("llama3", {"model_type": "qwen3", "architectures": ["Q"]}, "model_type 'qwen3'"),
        ("llama3", {"hidden_act": "tanh"}, "hidden_act: found 'tanh'"),
        ("llama3", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope type 'yarn'"),
        ("llama3", {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "default"}}, "0.5"),
        ("llama3", DENSE, "modules_to_not_convert leaves this linear layer dense"),
        (
            "bitnet",
            {
                "quantization_config": {
                    "quant_method": "bitnet",
                    "linear_class": "autobitlinear",
                    "modules_to_not_convert": [],
                }
            },
            "names no lm_head",
        ),
        ("bitnet-bf16", {"quantization_config": {"quant_method": "bitnet"}}, "found latent BF16"),
    ],
)
def test_what_does_not_run_says_so(
    tmp_path: Path, family: str, changes: dict[str, Any], match: str
) -> None:
    make_hf(tmp_path, family, **changes)
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(tmp_path)


def test_an_extra_tensor_is_another_model(tmp_path: Path) -> None:
    made = make_hf(tmp_path, "llama3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(UnsupportedModelError, match=r"model\.layers\.1\..* is not part of"):
        open_checkpoint(made.path)


# Where checkpoints are: files, folders, the hub.


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    make_hf(tmp_path, "bitnet")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UnsupportedModelError, match=r"only pytorch_model\.bin, a pickle"):
        open_checkpoint(tmp_path)
    for name in ("pytorch_model.bin", "model.pt", "model.pkl"):
        (tmp_path / name).write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path, filename=name)
        with pytest.raises(CheckpointError):
            open_checkpoint(tmp_path / name)


def test_a_file_of_a_directory_is_chosen(tmp_path: Path) -> None:
    made = make_hf(tmp_path, "bitnet")
    (tmp_path / "model.safetensors").rename(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"found 2 \.safetensors files"):
        open_checkpoint(tmp_path)
    for chosen in (
        open_checkpoint(tmp_path, filename="a.safetensors"),
        open_checkpoint(tmp_path / "a.safetensors"),
        open_checkpoint(str(tmp_path / "a.safetensors")),
    ):
        assert chosen.ternary("layers.0.q").scale == made.scales["layers.0.q"]


def test_absent_paths(tmp_path: Path) -> None:
    for path in (tmp_path / "none", "no such place", "./demo-that-is-not-here", "a/b/c"):
        with pytest.raises(CheckpointError, match="no such file or directory"):
            open_checkpoint(path)
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="i2s_layout: found 'odd'"):
        open_checkpoint(tmp_path, i2s_layout="odd")


def hub_cache(root: Path, source: Path, repo: str = "owner/name") -> Path:
    """A folder as huggingface_hub caches it: blobs, and a snapshot of links to them."""
    folder = root / f"models--{repo.replace('/', '--')}"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir()
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(commit)
    for i, file in enumerate(sorted(source.iterdir())):
        blob = folder / "blobs" / f"{i:040x}"
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


def test_an_offline_cache_is_used(tmp_path: Path) -> None:
    made = make_hf(tmp_path / "m", "bitnet")
    snapshot = hub_cache(tmp_path / "cache", made.path)
    checkpoint = open_checkpoint("owner/name", cache_dir=tmp_path / "cache", local_files_only=True)
    assert checkpoint.path == snapshot
    assert checkpoint.ternary("layers.0.q").scale == made.scales["layers.0.q"]
    assert set(checkpoint.tokenizer_files()) == {"tokenizer.json", "tokenizer_config.json"}
    with pytest.raises(CheckpointError, match=r"owner/other: cannot be had"):
        open_checkpoint("owner/other", cache_dir=tmp_path / "cache", local_files_only=True)


@pytest.mark.parametrize("filename", [None, "model.safetensors"])
def test_what_the_hub_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filename: str | None
) -> None:
    made = make_hf(tmp_path, "bitnet")
    asked: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        asked.append({"repo": repo, **options})
        return str(made.path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    options = {"revision": "v1", "token": "secret", "cache_dir": tmp_path / "c"}
    open_checkpoint("owner/name", filename=filename, **options)
    (call,) = asked
    patterns = call.pop("allow_patterns")
    assert call == {
        "repo": "owner/name",
        "local_files_only": False,
        "ignore_patterns": ["*/*"],
        **options,
    }
    assert ("*.safetensors" in patterns) is (filename is None)
    assert not any(p.endswith(("bin", "pt", "pth", "pkl", "py", "*")) for p in patterns)


def test_the_only_gguf_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from make_gguf import make_gguf

    files = ["a.gguf", "README.md", "old/b.gguf"]

    class Api:
        def __init__(self, token: str | None = None) -> None:
            assert token == "secret"

        def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
            assert (repo, revision) == ("owner/name", "v1")
            return files

    def snapshot_download(repo: str, *, allow_patterns: list[str], **_: Any) -> str:
        if "a.gguf" in allow_patterns:
            make_gguf(tmp_path / "a.gguf")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    checkpoint = open_checkpoint("owner/name", revision="v1", token="secret")
    assert checkpoint.path == tmp_path / "a.gguf"
    files.append("c.gguf")
    (tmp_path / "a.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"found 2 \.gguf files .* a\.gguf, c\.gguf"):
        open_checkpoint("owner/name", revision="v1", token="secret")
