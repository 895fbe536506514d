"""Every family and form read back equal to the values it was made of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import FAMILIES, LATENT, Made, make_hf
from make_gguf import ARCHITECTURES, make_gguf
from reference_formats import decode, from_bf16

from bitnet_ext.checkpoint import Checkpoint, Table, open_checkpoint

LAYOUTS = {"i2_s_arm": "arm", "i2_s_rows4": "rows4"}
WEIGHTS = ("i2_s", "i2_s_arm", "i2_s_rows4", "tq1_0", "tq2_0", "f32", "f16", "bf16")
TABLES = ("f32", "f16", "bf16", "q8_0", "q6_k", "q4_0", "q4_k")


def floats(table: Table) -> np.ndarray:
    """A table's values as float32."""
    if table.dtype == "f32":
        return table.data
    assert table.data.dtype == np.uint16
    if table.dtype == "bf16":
        return from_bf16(table.data)
    return table.data.view(np.float16).astype(np.float32)


def check(checkpoint: Checkpoint, made: Made) -> None:
    """All of a checkpoint's tensors against the truth."""
    for name, codes in made.codes.items():
        source = checkpoint.ternary(name)
        n, k = source.shape
        assert (source.name, source.shape, source.divide) == (name, codes.shape, made.divide)
        got = decode(source.kind, source.data, n, k)
        order = source.row_order
        assert np.array_equal(got if order is None else got[order], codes), name
        if source.kind in ("f32", "f16", "bf16"):
            assert source.scale == 0
            assert np.array_equal(floats(Table(source.data, source.kind)), made.latent[name])
        else:
            assert np.float32(source.scale) == np.float32(made.scales[name]), name
    for name, values in made.dense.items():
        got = checkpoint.dense(name)
        assert got.dtype == np.float32
        assert np.array_equal(got, values), name
        assert got.flags.owndata or got.flags.writeable
    for name, values in made.tables.items():
        assert np.array_equal(floats(checkpoint.table(name)), values), name
    every = [*made.codes, *made.dense, *made.tables]
    assert all(checkpoint.has(name) for name in every)
    assert not checkpoint.has("layers.99.q")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_families(tmp_path: Path, family: str, dtype: str) -> None:
    made = make_hf(tmp_path, family, dtype=dtype, shards=1 if dtype == "f32" else 3)
    check(open_checkpoint(tmp_path), made)


@pytest.mark.parametrize("family", FAMILIES)
def test_tied_and_untied(tmp_path: Path, family: str) -> None:
    published = make_hf(tmp_path / "a", family).config["tie_word_embeddings"]
    made = make_hf(tmp_path / "b", family, tie_word_embeddings=not published)
    checkpoint = open_checkpoint(tmp_path / "b")
    check(checkpoint, made)
    assert checkpoint.config.tie_word_embeddings is not published
    assert checkpoint.has("head") is published


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in LATENT and f != "gpt2"])
@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
def test_both_scale_rules_with_biases(tmp_path: Path, family: str, linear_class: str) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    biases = {"attention_bias": True} | ({} if family == "bitnet" else {"mlp_bias": True})
    made = make_hf(tmp_path, family, dtype="f32", quantization_config=quantization, **biases)
    checkpoint = open_checkpoint(tmp_path)
    check(checkpoint, made)
    assert checkpoint.config.scale_rule == ("divide" if made.divide else "multiply")
    assert checkpoint.config.attention_bias


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "rope", "ffn_norm": False},
        {"fused_qkv": False, "attn_sub_norm": True, "ffn_sub_norm": True, "linear_norm": True},
        {"head_bias": True, "tie_word_embeddings": False, "scale_rule": "divide"},
        {"gated_ffn": True, "norm": "rms", "attention_bias": False, "ffn_bias": False},
    ],
)
def test_own_form(tmp_path: Path, changes: dict[str, object]) -> None:
    made = make_hf(tmp_path, "gpt2", **changes)
    checkpoint = open_checkpoint(tmp_path)
    check(checkpoint, made)
    for key, value in changes.items():
        assert getattr(checkpoint.config, key) == value


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_gguf(tmp_path: Path, arch: str, weights: str) -> None:
    embedding = TABLES[WEIGHTS.index(weights) % len(TABLES)]
    made = make_gguf(tmp_path / "m.gguf", arch, weights=weights, embedding=embedding)
    layout = LAYOUTS.get(weights, "canonical")
    checkpoint = open_checkpoint(tmp_path / "m.gguf", i2s_layout=layout)
    check(checkpoint, made)
    assert checkpoint.config.hidden_act == ("relu2" if "-" in arch else "silu")
    assert checkpoint.config.attn_sub_norm is (arch != "llama")


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("embedding", TABLES)
def test_gguf_tables_and_extra_scales(tmp_path: Path, arch: str, embedding: str) -> None:
    made = make_gguf(
        tmp_path / "m.gguf",
        arch,
        weights="tq2_0",
        embedding=embedding,
        tied=arch == "bitnet",
        extra_scale=True,
    )
    check(open_checkpoint(tmp_path / "m.gguf"), made)
