"""GGUF writer: read again, by this package and by others, it is the same model and tokenizer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_checkpoints import make_hf
from make_gguf import ARCHITECTURES, make_gguf, permuted
from test_save import resave, same

from bitnet_ext import BitNetConfig, BitNetModel
from bitnet_ext.checkpoint import open_checkpoint, save_gguf
from bitnet_ext.errors import CheckpointError, UnsupportedModelError
from bitnet_ext.model.load import RandomWeights, load_weights


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "i2_s", "f16", "f32"])
@pytest.mark.parametrize("family", ["bitnet", "1bitllm", "llama3", "falcon-e"])
def test_gguf(tmp_path: Path, family: str, kind: str) -> None:
    made = make_hf(tmp_path / "a", family)
    first = open_checkpoint(tmp_path / "a")
    change = save_gguf(tmp_path / "m.gguf", first.config, load_weights(first), first, kind)
    again = open_checkpoint(tmp_path / "m.gguf")
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a", "m.gguf"]
    if made.divide:
        made.scales = {n: float(np.float32(1) / np.float32(s)) for n, s in made.scales.items()}
    exact = kind in ("i2_s", "f32")
    same(again, made, exact_scales=exact)
    for name, scale in made.scales.items():
        assert abs(again.ternary(name).scale / scale - 1) <= max(change, 2**-23)
    assert change < (1e-7 if exact else 2**-11)
    config = replace(again.config, norm_eps=first.config.norm_eps, scale_rule="divide")
    wanted = replace(first.config, scale_rule="divide", ffn_bias=False)
    assert replace(config, model_type="x") == replace(wanted, model_type="x")


def test_a_model_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    """As llama.cpp wants it said; it refuses a file without the key."""
    config = BitNetConfig.tiny()
    save_gguf(tmp_path / "m.gguf", config, load_weights(RandomWeights(config)), None, "f32")
    model = BitNetModel.from_pretrained(tmp_path / "m.gguf")
    assert model._checkpoint.gguf_metadata["tokenizer.ggml.model"] == "none"
    assert not model.has_tokenizer
    assert len(model.generate([1, 2, 3], max_new_tokens=4).token_ids) == 4
    with pytest.raises(CheckpointError, match="has no tokenizer; pass token ids"):
        model.generate("text")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gguf_to_directory_and_back(tmp_path: Path, arch: str) -> None:
    made = make_gguf(tmp_path / "a.gguf", arch, weights="tq2_0", embedding="q8_0")
    first = open_checkpoint(tmp_path / "a.gguf")
    directory = resave(first, tmp_path / "b")
    same(directory, made)
    weights = load_weights(directory)
    assert save_gguf(tmp_path / "c.gguf", directory.config, weights, directory, "tq2_0") == 0
    same(open_checkpoint(tmp_path / "c.gguf"), made)
    weights = load_weights(first)
    assert save_gguf(tmp_path / "d.gguf", first.config, weights, first, "tq1_0") == 0
    again = open_checkpoint(tmp_path / "d.gguf")
    same(again, made)
    assert again.config == first.config
    tokenizer = {k: v for k, v in first.gguf_metadata.items() if k.startswith("tokenizer.")}
    for key, value in tokenizer.items():
        assert np.array_equal(again.gguf_metadata[key], value), key


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "f16", "f32"])
def test_the_gguf_package_reads_what_is_written(tmp_path: Path, kind: str) -> None:
    from gguf import GGUFReader, quants

    made = make_hf(tmp_path / "a", "llama3", vocab_size=400)
    first = open_checkpoint(tmp_path / "a")
    save_gguf(tmp_path / "m.gguf", first.config, load_weights(first), first, kind)
    reader = GGUFReader(tmp_path / "m.gguf")
    tensors = {t.name: t for t in reader.tensors}
    for name, heads in (("q", 8), ("k", 2), ("up", 1)):
        canonical, stored = f"layers.1.{name}", {"q": "attn_q", "k": "attn_k", "up": "ffn_up"}[name]
        tensor = tensors[f"blk.1.{stored}.weight"]
        values = quants.dequantize(tensor.data, tensor.tensor_type)
        codes = made.codes[canonical]
        codes = codes if name == "up" else permuted(codes, heads)
        assert np.array_equal(np.sign(values).reshape(codes.shape), codes)
        scale = 1 / made.scales[canonical]
        assert np.abs(values).max() == pytest.approx(scale, rel=2**-11)
    fields = reader.fields
    assert fields["general.architecture"].contents() == "llama"
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert len(tokens) == first.config.vocab_size
    raw = json.loads((tmp_path / "a/tokenizer.json").read_text())
    assert all(tokens[i] == token for token, i in raw["model"]["vocab"].items())
    merges = [" ".join(pair) for pair in raw["model"]["merges"]]
    assert fields["tokenizer.ggml.merges"].contents() == merges
    assert fields["tokenizer.ggml.pre"].contents() == "gpt-2"
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    config = json.loads((tmp_path / "a/tokenizer_config.json").read_text())
    assert fields["tokenizer.chat_template"].contents() == config["chat_template"]
    types = fields["tokenizer.ggml.token_type"].contents()
    special = raw["added_tokens"][0]["id"]
    assert types[special] == 3
    assert types[0] == 1
    assert types[-1] == 5


def test_llama3_rope_goes_through_gguf(tmp_path: Path) -> None:
    changes = {"quantization_config": {"quant_method": "bitnet"}}
    make_hf(tmp_path / "a", "llama-rms", **changes)
    first = open_checkpoint(tmp_path / "a")
    save_gguf(tmp_path / "m.gguf", first.config, load_weights(first), first, "i2_s")
    assert open_checkpoint(tmp_path / "m.gguf").config.rope_scaling == first.config.rope_scaling


def test_what_gguf_cannot_hold(tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"

    def refused(config: BitNetConfig, kind: str, match: str) -> None:
        weights = load_weights(RandomWeights(config))
        with pytest.raises(UnsupportedModelError, match=match):
            save_gguf(target, config, weights, None, kind)  # type: ignore[arg-type]
        assert not any(tmp_path.iterdir())

    tiny = BitNetConfig.tiny()
    refused(tiny, "tq2_0", "layers.0.q: found 96 columns, wanted a multiple of 256")
    refused(replace(tiny, hidden_act="gelu"), "f32", "hidden_act=gelu")
    refused(replace(tiny, hidden_act="silu", tie_word_embeddings=False), "f32", "tied head")
    untied = replace(BitNetConfig.gpt2_small(), num_layers=1, vocab_size=64)
    refused(untied, "f32", "norm=layer")


# Tokenizers in GGUF files.

TEXTS = ("the quick brown fox", " two  spaces\n\n\ttabs 12345", "naïve \U0001f642 <|eot_id|>", "")
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLIT = {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False}
SPELL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def through_gguf(directory: Path, target: Path) -> BitNetModel:
    checkpoint = open_checkpoint(directory)
    save_gguf(target, checkpoint.config, load_weights(checkpoint), checkpoint, "i2_s")
    return BitNetModel.from_pretrained(target)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe"])
def test_a_byte_level_tokenizer_goes_through_gguf(tmp_path: Path, pre: str) -> None:
    make_hf(tmp_path / "a", "bitnet", layers=1)
    path = tmp_path / "a/tokenizer.json"
    if pre == "llama-bpe":
        raw = json.loads(path.read_text())
        raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [SPLIT, SPELL]}
        path.write_text(json.dumps(raw))
    first = BitNetModel.from_pretrained(tmp_path / "a")
    again = through_gguf(tmp_path / "a", tmp_path / "m.gguf")
    assert again._checkpoint is not None
    assert again._checkpoint.gguf_metadata["tokenizer.ggml.pre"] == pre
    for text in TEXTS:
        ids = first.tokenizer.encode(text, parse_special=True)
        assert again.tokenizer.encode(text, parse_special=True) == ids
        assert again.tokenizer.decode(ids) == first.tokenizer.decode(ids)
    turns = [{"role": "user", "content": "the fox"}]
    wanted = first.tokenizer.apply_chat_template(turns)
    assert again.tokenizer.apply_chat_template(turns) == wanted
    assert again.config.eos_token_ids == first.config.eos_token_ids


def test_a_sentencepiece_tokenizer_goes_through_gguf(tmp_path: Path) -> None:
    make_hf(tmp_path / "a", "1bitllm", layers=1, tokenizer=False, vocab_size=640)
    model = Path(__file__).parent / "data/spm_plain.model"
    (tmp_path / "a/tokenizer.model").write_bytes(model.read_bytes())
    first = BitNetModel.from_pretrained(tmp_path / "a")
    added = {"<pad>": first.tokenizer.vocab_size}
    (tmp_path / "a/added_tokens.json").write_text(json.dumps(added))
    first = BitNetModel.from_pretrained(tmp_path / "a")
    again = through_gguf(tmp_path / "a", tmp_path / "m.gguf")
    for text in (*TEXTS, "<pad>"):
        ids = first.tokenizer.encode(text, parse_special=True)
        assert again.tokenizer.encode(text, parse_special=True) == ids
        assert again.tokenizer.decode(ids) == first.tokenizer.decode(ids)
    make_hf(tmp_path / "b", "1bitllm", layers=1, tokenizer=False, vocab_size=64)
    (tmp_path / "b/tokenizer.model").write_bytes(model.read_bytes())
    with pytest.raises(CheckpointError, match="wanted at most 64, the rows of the embedding"):
        through_gguf(tmp_path / "b", tmp_path / "b.gguf")
    (tmp_path / "b/tokenizer.model").write_bytes(b"\xff" * 40)
    with pytest.raises(CheckpointError, match="is no sentencepiece model"):
        through_gguf(tmp_path / "b", tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("key", "value", "match"),
    [
        ("pre_tokenizer", {"type": "Whitespace"}, "GGUF has no name for"),
        ("model", {"type": "Unigram", "vocab": []}, "is not a byte-level BPE"),
        ("model", {"type": "BPE", "vocab": {"a": 999}, "merges": []}, "'a' with id 999"),
        ("model", {"type": "BPE", "vocab": {"a": 0}, "merges": ["a"]}, "found 'a', wanted two"),
        ("model", {"type": "BPE", "vocab": [], "merges": []}, "wanted an object vocab"),
        ("added_tokens", [1], "wanted a list of objects"),
    ],
)
def test_tokenizers_that_gguf_cannot_hold(
    tmp_path: Path, key: str, value: object, match: str
) -> None:
    make_hf(tmp_path / "a", "bitnet", layers=1)
    path = tmp_path / "a/tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    checkpoint = open_checkpoint(tmp_path / "a")
    with pytest.raises(CheckpointError, match=match):
        save_gguf(tmp_path / "m.gguf", checkpoint.config, load_weights(checkpoint), checkpoint)
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.parametrize("place", ["file", "string", "list"])
def test_chat_templates_go_through_gguf(tmp_path: Path, place: str) -> None:
    make_hf(tmp_path / "a", "bitnet", layers=1)
    path = tmp_path / "a/tokenizer_config.json"
    config = json.loads(path.read_text())
    if place == "file":
        (tmp_path / "a/chat_template.jinja").write_text("{{ messages[0].content }}!")
    elif place == "list":
        named = {"default": "{{ messages[0].content }}!", "tool_use": "tools"}
        config["chat_template"] = [{"name": n, "template": t} for n, t in named.items()]
    else:
        config["chat_template"] = "{{ messages[0].content }}!"
    path.write_text(json.dumps(config))
    again = through_gguf(tmp_path / "a", tmp_path / "m.gguf")
    turns = [{"role": "user", "content": "hi"}]
    assert again.tokenizer.decode(again.tokenizer.apply_chat_template(turns)) == "hi!"
