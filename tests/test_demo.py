"""The shipped demo: small, readable by the real reader, and as good as its training said."""

from __future__ import annotations

import ast
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
from reference_formats import decode_hf

import bitnet_ext as bx
from bitnet_ext.checkpoint.families import slots
from bitnet_ext.checkpoint.open import open_checkpoint
from bitnet_ext.checkpoint.source import Checkpoint
from bitnet_ext.generate.tokenizer import Tokenizer

TESTS = Path(__file__).parent
DEMO = TESTS.parent / "bitnet_ext" / "demo"
HELD_OUT = sorted((TESTS / "heldout").glob("*.py.txt"))
GOLDEN = json.loads((TESTS / "goldens" / "demo_bpb.json").read_text())


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return open_checkpoint("demo")


def read(path: Path) -> str:
    return path.read_bytes().decode()


def test_the_demo_is_at_most_six_megabytes() -> None:
    assert sum(p.stat().st_size for p in DEMO.iterdir()) <= 6_000_000


def test_every_tensor_loads_and_was_trained(demo: Checkpoint) -> None:
    kinds = {"linear": 0, "vector": 0, "table": 0}
    for slot in slots(demo.config):
        kinds[slot.kind] += 1
        if slot.kind == "linear":
            source = demo.ternary(slot.name)
            codes = decode_hf(np.asarray(source.data), *slot.shape).astype(np.int8) - 1
            # absmean of a bell-shaped matrix leaves about 31% zeros
            assert 0.2 < np.mean(codes == 0) < 0.6, slot.name
            assert abs(np.mean(codes)) < 0.1, slot.name
            assert 0 < source.scale < 1
        elif slot.kind == "vector":
            assert np.all(np.abs(demo.dense(slot.name)) < 100), slot.name
        else:
            assert demo.table(slot.name).data.shape == slot.shape
    assert kinds["linear"] == 7 * demo.config.num_layers
    assert kinds["vector"] == 4 * demo.config.num_layers + 1


def test_the_tokenizer_gives_back_every_held_out_byte(demo: Checkpoint) -> None:
    tokenizer = Tokenizer.from_checkpoint(demo)
    assert tokenizer.vocab_size == demo.config.vocab_size == 4096
    for text in [*map(read, HELD_OUT), "naïve\t\r\n\0 \N{GRINNING FACE} <|end_of_text|>"]:
        ids = tokenizer.encode(text)
        assert ids[0] == demo.config.bos_token_id
        assert demo.config.eos_token_ids[0] not in ids
        assert tokenizer.decode(ids) == text


def test_the_held_out_files_are_those_of_the_evaluation(demo: Checkpoint) -> None:
    tokenizer = Tokenizer.from_checkpoint(demo)
    assert len(HELD_OUT) >= 20
    assert {p.name.removesuffix(".txt") for p in HELD_OUT} == set(GOLDEN["ternary"]["files"])
    for path in HELD_OUT:
        row = GOLDEN["ternary"]["files"][path.name.removesuffix(".txt")]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == row["sha256"], path.name
        assert path.stat().st_size == row["bytes"]
        assert len(tokenizer.encode(read(path))) - 1 == row["tokens"]


@pytest.fixture(scope="module")
def model() -> bx.BitNetModel:
    return bx.BitNetModel.from_pretrained("demo")


def test_score_equals_the_training_script(model: bx.BitNetModel) -> None:
    """One flip of the activation quantiser moves a row a little; a file's mean hardly moves."""
    bits = size = 0.0
    for path, score in zip(HELD_OUT, model.score([*map(read, HELD_OUT)]), strict=True):
        row = GOLDEN["ternary"]["files"][path.name.removesuffix(".txt")]
        assert score.num_tokens == row["tokens"]
        assert score.bits_per_byte == pytest.approx(row["bits_per_byte"], abs=1e-3), path.name
        bits -= score.total / math.log(2)
        size += row["bytes"]
    assert bits / size == pytest.approx(GOLDEN["ternary"]["total"], abs=1e-3)


def test_the_demo_continues_python_with_python(model: bx.BitNetModel) -> None:
    prompt = "def read_json(path):\n"
    first, again = (str(model.generate(prompt, max_new_tokens=128)) for _ in range(2))
    assert first == again
    lines = [line for line in first.splitlines(keepends=True) if line.endswith("\n")]
    assert len(lines) >= 4
    ends = range(len(lines), len(lines) // 2, -1)
    assert any(_parses(prompt + "".join(lines[:end])) for end in ends), first


def _parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_the_demo_compresses_better_than_its_rivals() -> None:
    total = GOLDEN["ternary"]["total"]
    assert total < GOLDEN["baselines"]["xz -9"]["files together"]
    assert total < GOLDEN["baselines"]["5-gram (interpolated Kneser-Ney)"]["bytes"]
