"""GGUF files: our numbers, blocks and permutation against the gguf package; published headers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from make_checkpoints import layout
from make_gguf import F32, STRING, TYPES, U32, Gguf, gguf_name, make_gguf, permuted
from published import PUBLISHED
from reference_formats import absmean, decode, encode_hf, encode_i2_s, to_bf16

from bitnet_ext.checkpoint import open_checkpoint
from bitnet_ext.checkpoint.gguf_config import LLAMA3_SCALINGS, llama3_factors
from bitnet_ext.checkpoint.gguf_constants import (
    ARCHITECTURES,
    ARRAY,
    BLOCKS,
    BOOL,
    SCALARS,
)
from bitnet_ext.checkpoint.gguf_constants import STRING as STRING_TYPE
from bitnet_ext.checkpoint.gguf_quants import dequantise, encode_tq1_0, encode_tq2_0
from bitnet_ext.errors import CheckpointError, UnsupportedModelError


def test_constants_are_those_of_the_gguf_package() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
    from gguf.constants import GGUF_DEFAULT_ALIGNMENT, MODEL_ARCH_NAMES

    for number, (name, elements, size) in BLOCKS.items():
        assert GGMLQuantizationType(number).name == name
        assert GGML_QUANT_SIZES[GGMLQuantizationType(number)] == (elements, size)
    scalars = {
        "UINT8": "<u1", "INT8": "<i1", "UINT16": "<u2", "INT16": "<i2", "UINT32": "<u4",
        "INT32": "<i4", "FLOAT32": "<f4", "BOOL": "u1", "UINT64": "<u8", "INT64": "<i8",
        "FLOAT64": "<f8",
    }  # fmt: skip
    assert {GGUFValueType[name].value: form for name, form in scalars.items()} == SCALARS
    assert tuple(GGUFValueType[name] for name in ("BOOL", "STRING", "ARRAY")) == (
        BOOL,
        STRING_TYPE,
        ARRAY,
    )
    assert GGUF_DEFAULT_ALIGNMENT == 32
    assert {"bitnet", "llama"} <= set(MODEL_ARCH_NAMES.values()) & set(ARCHITECTURES)


@pytest.mark.parametrize("name", ["Q4_0", "Q8_0", "Q6_K", "Q4_K"])
def test_blocks_are_dequantised_as_the_gguf_package_does(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[name]
    _, elements, size = BLOCKS[kind.value]
    rng = np.random.default_rng(5)
    raw = rng.integers(0, 256, (7, 3, size)).astype(np.uint8)
    halves = np.array([0.01, -3.5, 6e-8, 60000.0, 0.0, 1.0, -0.0], np.float16).view(np.uint8)
    places = {"Q4_0": [0], "Q8_0": [0], "Q6_K": [208], "Q4_K": [0, 2]}[name]
    for at in places:
        raw[:, :, at : at + 2] = halves.reshape(7, 1, 2)
    got = dequantise(kind.value, raw.reshape(-1), (7, 3 * elements), name)
    wanted = quants.dequantize(raw.reshape(7, -1), kind)
    assert np.array_equal(got.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("name", ["TQ1_0", "TQ2_0"])
def test_ternary_blocks_are_those_of_the_gguf_package(name: str) -> None:
    from gguf import GGMLQuantizationType, quants

    rng = np.random.default_rng(6)
    codes = rng.integers(-1, 2, (8, 512)).astype(np.int8)
    codes[3, :256] = 0
    raw = quants.quantize(codes * np.float32(0.25), GGMLQuantizationType[name])
    ours = (encode_tq1_0 if name == "TQ1_0" else encode_tq2_0)(codes, 0.25)
    assert np.array_equal(ours, raw.reshape(-1))


def independent_file(path: Path, kind: str, made: dict[str, Any]) -> None:
    """A llama GGUF by the gguf package's own writer and quantiser (I2_S bytes by our tests')."""
    from gguf import GGMLQuantizationType, GGUFWriter, quants

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    for name, array in made["dense"].items():
        writer.add_tensor(name, array)
    number = GGMLQuantizationType[kind]
    for name, values in made["ternary"].items():
        raw = quants.quantize(values, number)
        writer.add_tensor(name, raw, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


SHAPES = {
    "attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "attn_output": (256, 256),
    "ffn_gate": (512, 256), "ffn_up": (512, 256), "ffn_down": (256, 512),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
def test_a_file_of_the_gguf_packages_writer(tmp_path: Path, kind: str) -> None:
    rng = np.random.default_rng(7)
    codes = {name: rng.integers(-1, 2, shape).astype(np.int8) for name, shape in SHAPES.items()}
    scale = np.float32(np.float16(0.0213))
    stored = dict(codes)
    stored["attn_q"], stored["attn_k"] = permuted(codes["attn_q"], 4), permuted(codes["attn_k"], 2)
    table = rng.normal(size=(64, 256)).astype(np.float16)
    norm = np.ones(256, np.float32)
    dense = {"token_embd.weight": table, "output_norm.weight": norm}
    dense |= {f"blk.0.{n}_norm.weight": norm for n in ("attn", "ffn")}
    ternary = {f"blk.0.{n}.weight": c * scale for n, c in stored.items()}
    independent_file(tmp_path / "m.gguf", kind, {"dense": dense, "ternary": ternary})
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    short = dict(zip(SHAPES, ("q", "k", "v", "o", "gate", "up", "down"), strict=True))
    for name, wanted in codes.items():
        source = checkpoint.ternary(f"layers.0.{short[name]}")
        got = decode(source.kind, source.data, *source.shape)
        got = got if source.row_order is None else got[source.row_order]
        assert np.array_equal(got, wanted), name
        assert source.scale == scale
    assert np.array_equal(checkpoint.table("embed").data, table.view(np.uint16))
    assert checkpoint.config.tie_word_embeddings
    assert checkpoint.config.vocab_size == 64


def test_un_permuting_is_the_converters_inverse(tmp_path: Path) -> None:
    """formats.md: w.reshape(H, d//2, 2, K).swapaxes(1, 2) undoes the converter's permute."""
    made = make_gguf(tmp_path / "m.gguf", "llama", weights="tq2_0")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    for name, heads in (("q", 8), ("k", 2)):
        source = checkpoint.ternary(f"layers.1.{name}")
        stored = decode(source.kind, source.data, *source.shape)
        n, k = stored.shape
        undone = stored.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)
        assert np.array_equal(stored[source.row_order], undone)
        assert np.array_equal(undone, made.codes[f"layers.1.{name}"])
        assert not np.array_equal(stored, undone)
    assert checkpoint.ternary("layers.1.v").row_order is None


def test_the_same_weights_come_out_of_every_form(tmp_path: Path) -> None:
    """Packed, latent, TQ1_0, TQ2_0 and I2_S files of independent writers, through the packer."""
    from gguf import GGMLQuantizationType, quants

    from bitnet_ext import _core

    codes = np.random.default_rng(8).integers(-1, 2, (96, 512)).astype(np.int8)
    scale = np.float32(0.03125)
    latent = codes * scale
    forms: dict[str, Any] = {
        "codes": codes,
        "hf": encode_hf(codes),
        "f32": latent,
        "f16": latent.astype(np.float16).view(np.uint16),
        "bf16": to_bf16(latent),
        "tq1_0": quants.quantize(latent, GGMLQuantizationType.TQ1_0).reshape(-1),
        "tq2_0": quants.quantize(latent, GGMLQuantizationType.TQ2_0).reshape(-1),
        "i2_s": encode_i2_s(codes),
    }
    for kind, data in forms.items():
        online = kind in ("f32", "f16", "bf16")
        source = (kind, kind, data, 96, 512, 0.0 if online else float(scale), False, None)
        for bits in ("2", "1.6"):
            packed = _core.PackedTernary.from_sources([source], bits)
            assert np.array_equal(packed.unpack(), codes), kind
            wanted = absmean(latent)[1] if online else scale
            assert np.float32(packed.scale) == pytest.approx(wanted, rel=1e-6), kind


# The released 2B-4T file, header only, at full size.


def released() -> Gguf:
    """Keys and tensors of microsoft/bitnet-b1.58-2B-4T-gguf, without data."""
    config, arch = PUBLISHED["bitnet"], "bitnet-b1.58"
    sizes = {
        "vocab_size": 128256, "context_length": 4096, "embedding_length": 2560, "block_count": 30,
        "feed_forward_length": 6912, "rope.dimension_count": 128, "attention.head_count": 20,
        "attention.head_count_kv": 5,
    }  # fmt: skip
    file = Gguf(keys=[("general.architecture", STRING, arch), ("general.file_type", U32, 40)])
    file.keys += [(f"{arch}.{key}", U32, value) for key, value in sizes.items()]
    file.keys += [
        (f"{arch}.attention.layer_norm_rms_epsilon", F32, 1e-5),
        (f"{arch}.rope.freq_base", F32, 500000.0),
        ("tokenizer.ggml.bos_token_id", U32, 128000),
        ("tokenizer.ggml.eos_token_id", U32, 128001),
    ]
    for _, name, shape, kind in layout("bitnet", config):
        if kind == "linear":
            file.tensors.append((f"{gguf_name(name)}.weight", TYPES["i2_s"], shape, b""))
        else:
            number = TYPES["f16"] if kind == "table" else TYPES["f32"]
            file.tensors.append((gguf_name(name), number, shape, b""))
    return file


def write_sparse(file: Gguf, path: Path) -> None:
    """The file with its data as a hole; offsets are written over the ones of empty data."""
    import struct

    sizes = [
        int(np.prod(shape)) // 4 + 32 if number == 36 else int(np.prod(shape)) * (4, 2)[number]
        for _, number, shape, _ in file.tensors
    ]
    raw = bytearray(file.bytes())
    offset = 0
    for (name, number, shape, _), size in zip(file.tensors, sizes, strict=True):
        at = raw.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name)
        at += 4 + 8 * len(shape) + 4
        raw[at : at + 8] = struct.pack("<Q", offset)
        assert raw[at - 4] == number
        offset += -(-size // 32) * 32
    with path.open("wb") as out:
        out.write(raw)
        out.truncate(len(raw) + offset)


def test_the_released_header_opens_at_full_size(tmp_path: Path) -> None:
    from bitnet_ext import BitNetConfig

    file = released()
    kinds = [number for _, number, _, _ in file.tensors]
    assert (len(kinds), kinds.count(0), kinds.count(1), kinds.count(36)) == (332, 121, 1, 210)
    write_sparse(file, tmp_path / "m.gguf")
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    wanted = BitNetConfig.bitnet_2b_4t()
    assert checkpoint.config.norm_eps == pytest.approx(1e-5)
    assert json.dumps(vars(checkpoint.config) | {"norm_eps": 0}, default=list) == json.dumps(
        vars(wanted) | {"norm_eps": 0}, default=list
    )
    assert checkpoint.format == "GGUF, bitnet-b1.58, I2_S"
    assert len(checkpoint.tensors()) == 332
    with pytest.raises(CheckpointError, match=r"attn_q\.weight: found the scale 0"):
        checkpoint.ternary("layers.0.q")


# What a ternary file must not be.


def edited(path: Path, change: Any) -> None:
    """Rewrite a file of ours with one thing changed in its list of tensors or keys."""
    from bitnet_ext.checkpoint.gguf import GgufFile

    old = GgufFile(path)
    arch = old.metadata["general.architecture"]
    file = Gguf(keys=_keys(old.metadata))
    for tensor in old.tensors.values():
        data = old.raw(tensor.name).tobytes()
        file.tensors.append((tensor.name, tensor.type, tensor.shape, data))
    change(file, arch)
    path.write_bytes(file.bytes())


def _keys(metadata: dict[str, Any]) -> list[tuple[str, int, Any]]:
    """Scalar and string keys; the vocabulary is not needed to open a file."""
    keys: list[tuple[str, int, Any]] = []
    for key, value in metadata.items():
        if isinstance(value, str):
            keys.append((key, STRING, value))
        elif isinstance(value, float):
            keys.append((key, F32, value))
        elif type(value) is int:
            keys.append((key, U32, value))
    return keys


def test_blocks_of_different_scales_are_not_ternary(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", weights="tq2_0")

    def change(file: Gguf, _: str) -> None:
        at = next(i for i, t in enumerate(file.tensors) if t[0] == "blk.0.attn_q.weight")
        name, kind, shape, data = file.tensors[at]
        raw = bytearray(data)
        raw[64:66] = np.float16(3).tobytes()
        file.tensors[at] = (name, kind, shape, bytes(raw))

    edited(tmp_path / "m.gguf", change)
    with pytest.raises(UnsupportedModelError, match=r"attn_q\.weight: found blocks of scale"):
        open_checkpoint(tmp_path / "m.gguf").ternary("layers.0.q")


@pytest.mark.parametrize(
    ("number", "match"),
    [
        (38, "tile configuration"),
        (39, "tile configuration"),
        (77, r"type unknown \(77\) is not read; use a file with TQ1_0"),
        (12, r"type Q4_K \(12\) is not read"),
    ],
)
def test_other_types_name_themselves(tmp_path: Path, number: int, match: str) -> None:
    make_gguf(tmp_path / "m.gguf", weights="f16")

    def change(file: Gguf, _: str) -> None:
        at = next(i for i, t in enumerate(file.tensors) if t[0] == "blk.0.attn_q.weight")
        name, _, shape, data = file.tensors[at]
        file.tensors[at] = (name, number, shape, data)

    edited(tmp_path / "m.gguf", change)
    with pytest.raises(UnsupportedModelError, match=match):
        open_checkpoint(tmp_path / "m.gguf")


def test_a_dense_llama_is_refused(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", "llama", weights="f32")

    def change(file: Gguf, _: str) -> None:
        at = next(i for i, t in enumerate(file.tensors) if t[0] == "blk.0.ffn_up.weight")
        name, kind, shape, _ = file.tensors[at]
        dense = np.random.default_rng(9).normal(size=shape).astype(np.float32)
        file.tensors[at] = (name, kind, shape, dense.tobytes())

    edited(tmp_path / "m.gguf", change)
    checkpoint = open_checkpoint(tmp_path / "m.gguf")
    with pytest.raises(UnsupportedModelError, match="a dense Llama model"):
        checkpoint.ternary("layers.0.up")


def test_other_architectures_name_themselves(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf")
    edited(tmp_path / "m.gguf", lambda file, _: file.keys.__setitem__(0, ("x", STRING, "y")))
    with pytest.raises(CheckpointError, match=r"general\.architecture: found None"):
        open_checkpoint(tmp_path / "m.gguf")
    make_gguf(tmp_path / "m.gguf")
    other = ("general.architecture", STRING, "gemma3")
    edited(tmp_path / "m.gguf", lambda file, _: file.keys.__setitem__(0, other))
    with pytest.raises(UnsupportedModelError, match="found 'gemma3', wanted one of bitnet"):
        open_checkpoint(tmp_path / "m.gguf")


def test_rope_factors_are_recognised(tmp_path: Path) -> None:
    make_gguf(tmp_path / "m.gguf", "llama", weights="tq1_0")
    scaling = LLAMA3_SCALINGS[5]
    factors = llama3_factors(scaling, 500000.0, 32)

    def change(file: Gguf, _: str) -> None:
        file.tensors.append(("rope_freqs.weight", 0, (16,), factors.tobytes()))

    edited(tmp_path / "m.gguf", change)
    assert open_checkpoint(tmp_path / "m.gguf").config.rope_scaling == scaling
    odd = np.linspace(1, 3, 16, dtype=np.float32)
    edited(
        tmp_path / "m.gguf",
        lambda file, _: file.tensors.__setitem__(
            -1, ("rope_freqs.weight", 0, (16,), odd.tobytes())
        ),
    )
    with pytest.raises(UnsupportedModelError, match="fit no published Llama-3 scaling"):
        open_checkpoint(tmp_path / "m.gguf")
