"""Writers: what is saved, read again, is the same model; independent readers agree."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import FAMILIES, Made, make_hf
from make_gguf import make_gguf
from reference_formats import decode, decode_hf
from test_checkpoint_families import floats

from bitnet_ext import BitNetConfig, BitNetModel
from bitnet_ext.checkpoint import Checkpoint, open_checkpoint, save_model
from bitnet_ext.checkpoint.families import slots
from bitnet_ext.checkpoint.safetensors import SafetensorsFile, write_safetensors
from bitnet_ext.errors import CheckpointError
from bitnet_ext.model.load import RandomWeights, load_weights

STOCK = {family: "bitnet" for family in ("bitnet", "bitnet-bf16", "1bitllm")}
STOCK |= {family: "llama" for family in ("llama3", "falcon3", "falcon-e", "llama-rms")}


def resave(checkpoint: Checkpoint, target: Path) -> Checkpoint:
    save_model(target, checkpoint.config, load_weights(checkpoint), checkpoint)
    return open_checkpoint(target)


def same(again: Checkpoint, made: Made, *, exact_scales: bool = True) -> None:
    """Every tensor of a checkpoint against the truth, whatever form it is stored in."""
    for slot in slots(again.config):
        if slot.kind == "linear":
            source = again.ternary(slot.name)
            codes = decode(source.kind, source.data, *source.shape)
            order = source.row_order
            codes = codes if order is None else codes[order]
            assert np.array_equal(codes, made.codes[slot.name]), slot.name
            assert source.divide == (made.divide and again.format.startswith("safetensors"))
            if exact_scales:
                assert np.float32(source.scale) == np.float32(made.scales[slot.name])
        elif slot.kind == "table":
            if slot.name == "positions":
                assert np.array_equal(again.dense(slot.name), made.tables[slot.name])
            else:
                assert np.array_equal(floats(again.table(slot.name)), made.tables[slot.name])
        else:
            assert np.array_equal(again.dense(slot.name), made.dense[slot.name]), slot.name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_saved_is_what_was_loaded(tmp_path: Path, family: str, dtype: str) -> None:
    made = make_hf(tmp_path / "a", family, dtype=dtype)
    first = open_checkpoint(tmp_path / "a")
    again = resave(first, tmp_path / "b")
    same(again, made)
    expected = STOCK.get(family, "bitnet_ext")
    assert replace(again.config, model_type=first.config.model_type) == first.config
    assert again.config.model_type == expected
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert config["model_type"] == expected
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "a" / name).read_bytes()
    assert again.table("embed").dtype == dtype
    third = resave(again, tmp_path / "c")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "b" / name).read_bytes() == (tmp_path / "c" / name).read_bytes()
    assert third.config == again.config


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_gives_the_same_bits(tmp_path: Path, family: str) -> None:
    """Also from one half of a fused matrix to the other: logits of every position."""
    make_hf(tmp_path / "a", family, dtype="bf16")
    ids = np.arange(40).reshape(2, 20)
    first = BitNetModel.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    again = BitNetModel.from_pretrained(tmp_path / "b")
    wanted = first.forward_full(ids)
    assert np.isfinite(wanted).all()
    assert np.array_equal(again.forward_full(ids), wanted)
    assert again.tokenizer.encode("the fox") == first.tokenizer.encode("the fox")
    assert again.generation_config == first.generation_config


@pytest.mark.parametrize("arch", ["bitnet-b1.58", "llama"])
def test_a_gguf_file_becomes_a_directory_with_its_tokenizer(tmp_path: Path, arch: str) -> None:
    make_gguf(tmp_path / "a.gguf", arch, weights="tq1_0", embedding="q6_k")
    first = BitNetModel.from_pretrained(tmp_path / "a.gguf")
    first.save_pretrained(tmp_path / "b")
    again = BitNetModel.from_pretrained(tmp_path / "b")
    assert np.array_equal(again.forward_full([9, 8, 7]), first.forward_full([9, 8, 7]))
    text = "def f(x):\n  return 'é' <|eot_id|>"
    for options in ({}, {"parse_special": True}, {"add_special_tokens": False}):
        ids = first.tokenizer.encode(text, **options)
        assert again.tokenizer.encode(text, **options) == ids
        assert again.tokenizer.decode(ids) == first.tokenizer.decode(ids)
    turns = [{"role": "user", "content": "the fox"}]
    chat = first.tokenizer.apply_chat_template(turns)
    assert again.tokenizer.apply_chat_template(turns) == chat
    assert again.config.eos_token_ids == first.config.eos_token_ids
    assert again.generation_config == first.generation_config


def test_latent_and_packed_layers_of_one_matrix(tmp_path: Path) -> None:
    """The package's own form may mix them, whatever its scale rule: q and v packed, k latent."""
    made = make_hf(tmp_path / "a", "gpt2", fused_qkv=False, scale_rule="divide", layers=1)
    path = tmp_path / "a/model.safetensors"
    file = SafetensorsFile(path)
    plan = [
        (n, i.dtype, i.shape, partial(np.copy, file.array(n)))
        for n, i in file.tensors.items()
        if not n.startswith("layers.0.k.weight")
    ]
    latent = made.codes["layers.0.k"] * np.float32(0.25)
    plan.append(("layers.0.k.weight", "F32", latent.shape, partial(np.copy, latent)))
    write_safetensors(path, plan)
    first = BitNetModel.from_pretrained(tmp_path / "a")
    first.save_pretrained(tmp_path / "b")
    again = BitNetModel.from_pretrained(tmp_path / "b")
    assert np.array_equal(again.forward_full([1, 2, 3]), first.forward_full([1, 2, 3]))
    source = open_checkpoint(tmp_path / "b").ternary("layers.0.k")
    assert source.divide
    assert source.scale == pytest.approx(1 / np.abs(latent).mean(), rel=1e-6)


def test_a_random_model_gives_the_same_bits(tmp_path: Path) -> None:
    for config in (BitNetConfig.tiny(), replace(BitNetConfig.tiny(), scale_rule="divide")):
        first = BitNetModel.random(config, seed=3)
        first.save_pretrained(tmp_path / "m")
        again = BitNetModel.from_pretrained(tmp_path / "m")
        assert np.array_equal(again.forward_full([5, 6, 7]), first.forward_full([5, 6, 7]))


@pytest.mark.parametrize(
    "changes",
    [
        {"position": "rope", "ffn_norm": False, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"fused_qkv": False, "attn_sub_norm": True, "ffn_sub_norm": True},
        {"fused_qkv": False, "linear_norm": True},
        {"head_bias": True, "tie_word_embeddings": False, "scale_rule": "divide"},
        {"gated_ffn": True, "norm": "rms", "attention_bias": False, "ffn_bias": False},
    ],
)
def test_own_form(tmp_path: Path, changes: dict[str, object]) -> None:
    made = make_hf(tmp_path / "a", "gpt2", **changes)
    first = open_checkpoint(tmp_path / "a")
    again = resave(first, tmp_path / "b")
    same(again, made)
    assert again.config == first.config


@pytest.mark.parametrize("linear_class", ["bitlinear", "autobitlinear"])
@pytest.mark.parametrize("family", ["bitnet", "llama3", "llama-rms"])
def test_biases_of_both_scale_rules(tmp_path: Path, family: str, linear_class: str) -> None:
    quantization = {"quant_method": "bitnet", "linear_class": linear_class}
    if family == "llama-rms":
        quantization |= {"use_rms_norm": True, "rms_norm_eps": 1e-5}
    biases = {"attention_bias": True} | ({} if family == "bitnet" else {"mlp_bias": True})
    made = make_hf(tmp_path / "a", family, dtype="bf16", quantization_config=quantization, **biases)
    first = open_checkpoint(tmp_path / "a")
    again = resave(first, tmp_path / "b")
    same(again, made)
    assert again.config == first.config
    section = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
    assert section["linear_class"] == linear_class


def test_rows_that_do_not_pack_are_kept_as_int8(tmp_path: Path) -> None:
    config = replace(BitNetConfig.tiny(), intermediate_size=174)
    weights = load_weights(RandomWeights(config))
    save_model(tmp_path / "m", config, weights, None)
    again = open_checkpoint(tmp_path / "m")
    assert again.config.model_type == "bitnet_ext"
    source = again.ternary("layers.1.gate")
    assert source.kind == "codes"
    assert np.array_equal(source.data, RandomWeights(config).ternary("layers.1.gate").data)


def test_the_safetensors_package_reads_what_is_written(tmp_path: Path) -> None:
    from safetensors import safe_open

    made = make_hf(tmp_path / "a", "llama3", dtype="f32")
    resave(open_checkpoint(tmp_path / "a"), tmp_path / "b")
    with safe_open(tmp_path / "b/model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        packed = file.get_tensor("model.layers.0.self_attn.k_proj.weight")
        n, k = made.codes["layers.0.k"].shape
        assert np.array_equal(decode_hf(packed, n, k).astype(np.int8) - 1, made.codes["layers.0.k"])
        scale = file.get_tensor("model.layers.0.self_attn.k_proj.weight_scale")
        assert scale == np.float32([made.scales["layers.0.k"]])


def test_an_int8_head_is_saved_from_its_checkpoint(tmp_path: Path) -> None:
    made = make_hf(tmp_path / "a", "llama3")
    checkpoint = open_checkpoint(tmp_path / "a")
    weights = load_weights(checkpoint)
    coarse = replace(weights, head=replace(weights.head, dtype="int8"))
    save_model(tmp_path / "b", checkpoint.config, coarse, checkpoint)
    same(open_checkpoint(tmp_path / "b"), made)
    with pytest.raises(CheckpointError, match="head: found an int8 copy"):
        save_model(tmp_path / "c", checkpoint.config, coarse, None)
    assert not (tmp_path / "c").exists()


# The target directory.


def test_an_earlier_model_is_replaced(tmp_path: Path) -> None:
    make_hf(tmp_path / "a", "bitnet", seed=1)
    made = make_hf(tmp_path / "b", "llama3", seed=2, tokenizer=False)
    target = tmp_path / "t"
    resave(open_checkpoint(tmp_path / "a"), target)
    again = resave(open_checkpoint(tmp_path / "b"), target)
    same(again, made)
    assert not (target / "tokenizer.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "t"]


def test_a_model_is_saved_over_the_files_it_is_mapped_from(tmp_path: Path) -> None:
    made = make_hf(tmp_path / "a", "bitnet")
    same(resave(open_checkpoint(tmp_path / "a"), tmp_path / "a"), made)


def test_other_files_are_never_touched(tmp_path: Path) -> None:
    make_hf(tmp_path / "a", "bitnet")
    checkpoint = open_checkpoint(tmp_path / "a")
    target = tmp_path / "t"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        resave(checkpoint, target)
    assert [p.name for p in target.iterdir()] == ["thesis.tex"]
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(CheckpointError, match="wanted a directory"):
        resave(checkpoint, file)
    assert file.read_text() == "mine"


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_all_as_it_was(
    tmp_path: Path, existing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_hf(tmp_path / "a", "bitnet")
    checkpoint = open_checkpoint(tmp_path / "a")
    target = tmp_path / "t"
    if existing:
        resave(checkpoint, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if existing else None

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(OSError, match="No space"):
        resave(checkpoint, target)
    monkeypatch.undo()
    if existing:
        monkeypatch.setattr(Path, "rename", _fails_second(Path.rename))
        with pytest.raises(OSError, match="No space"):
            resave(checkpoint, target)
        monkeypatch.undo()
    found = {p.name: p.read_bytes() for p in target.iterdir()} if target.exists() else None
    assert found == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["a", "t"] if existing else ["a"])


def _fails_second(rename):  # type: ignore[no-untyped-def]
    calls = iter([True, False, True])

    def renamed(self: Path, target: Path) -> Path:
        if not next(calls):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    return renamed


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        target = Path("/proc/no_such_place/model")
    else:
        tmp_path.chmod(0o500)
        target = tmp_path / "model"
    config = replace(BitNetConfig.tiny(), num_layers=1)
    with pytest.raises(OSError):
        save_model(target, config, load_weights(RandomWeights(config)), None)
