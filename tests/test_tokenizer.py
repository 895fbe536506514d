"""Tokenizers of every source: against the tokenizers and sentencepiece libraries, and hostile."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from make_checkpoints import make_hf
from make_gguf import make_gguf
from make_tokenizers import BOS, DATA, EOS, EOT, from_files, from_gguf, gguf_keys, spm_keys
from sentencepiece import sentencepiece_model_pb2
from tiny_tokenizer import SPECIALS, TEXT, tokenizer_config, tokenizer_json, vocabulary
from tokenizers import Tokenizer as Backend

from bitnet_ext.checkpoint import open_checkpoint
from bitnet_ext.errors import CheckpointError, InvalidShapeError, UnsupportedModelError
from bitnet_ext.generate.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "hello world",
    "  two  spaces\n\n\ttabs",
    TEXT,
    "naïve café, 東京 🙂👩‍👩‍👧 \u0000 e\u0301",
    "def f(x):\n    return x**2  # 12345678\r\n",
    "I'll they've IT'S",
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    made = make_hf(tmp_path_factory.mktemp("checkpoint"))
    return Tokenizer.from_checkpoint(open_checkpoint(made.path))


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_is_read_as_the_library_reads_it(tokenizer: Tokenizer, text: str) -> None:
    library = Backend.from_str(json.dumps(tokenizer_json(320)))
    library.encode_special_tokens = True
    assert tokenizer.encode(text) == library.encode(text).ids
    assert tokenizer.encode(text)[0] == BOS == tokenizer.bos_token_id
    assert tokenizer.encode(text, add_special_tokens=False) == tokenizer.encode(text)[1:]
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_facts(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert tokenizer.adds_bos
    assert tokenizer.eos_token_id == EOS
    assert tokenizer.special_ids == {BOS, EOS, EOT}
    assert tokenizer.id_to_token(EOT) == "<|eot_id|>"
    assert tokenizer.token_to_id("no such token") is None
    assert tokenizer.id_to_token(320) is None
    assert tokenizer.id_to_token(-1) is None


def test_special_tokens_in_text_are_text_unless_asked(tokenizer: Tokenizer) -> None:
    text = "a<|eot_id|>b"
    assert EOT not in tokenizer.encode(text)
    assert tokenizer.encode(text, parse_special=True)[2] == EOT
    assert EOT not in tokenizer.encode(text), "the switch must not stick"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([EOT, ord("a")], skip_special_tokens=False) == "<|eot_id|>a"
    assert tokenizer.decode([EOT, ord("a")]) == "a"


def test_threads_do_not_disturb_each_other(tokenizer: Tokenizer) -> None:
    text = "x<|eot_id|>y" * 20
    wrong: list[bool] = []

    def work(parse: bool) -> None:
        for _ in range(100):
            if (EOT in tokenizer.encode(text, parse_special=parse)) != parse:
                wrong.append(parse)

    workers = [threading.Thread(target=work, args=(i % 2 == 0,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"bytes", "found bytes"), (None, "found NoneType"), ("a\ud800", "lone surrogate.*at 1")],
)
def test_encode_refuses_what_is_not_text(tokenizer: Tokenizer, text: Any, message: str) -> None:
    with pytest.raises(InvalidShapeError, match=message):
        tokenizer.encode(text)


@pytest.mark.parametrize("ids", [["a"], [1.0], [True], [None]])
def test_decode_refuses_what_is_not_an_id(tokenizer: Tokenizer, ids: Any) -> None:
    with pytest.raises(InvalidShapeError, match="wanted integers"):
        tokenizer.decode(ids)


def test_decode_of_ids_without_a_token(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([320, 10**6, -1, *tokenizer.encode("ok", False)]) == "ok"
    assert tokenizer.decode(np.array(tokenizer.encode("ok"))) == "ok"


# --- decoding as tokens come ------------------------------------------------------------------


def test_random_ids_decode_as_the_library_decodes_them(tokenizer: Tokenizer) -> None:
    library = Backend.from_str(json.dumps(tokenizer_json(320)))
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(320) for _ in range(rng.randrange(12))]
        assert tokenizer.decode(ids) == library.decode(ids)


def test_tokens_that_byte_level_text_cannot_spell(tmp_path: Path) -> None:
    content = tokenizer_json(320)
    content["added_tokens"][2]["content"] = "<a \u4e1c>"
    content["added_tokens"][2]["special"] = False
    tokenizer = from_files(tmp_path, tokenizer__json=content)
    assert tokenizer.decode([EOT, ord("x")]) == "<a \u4e1c>x"


def test_tokens_that_only_look_like_bytes() -> None:
    keys = spm_keys()
    keys["tokenizer.ggml.tokens"][10] = "<0xZZ>"
    tokenizer = from_gguf(keys)
    assert tokenizer.decode([10, tokenizer.token_to_id("<0x8B>")]) == "<0xZZ>\ufffd"


def test_stream_holds_back_split_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(ids) == 6, "the emoji must be four tokens for this test to mean something"
    stream = tokenizer.stream_decoder()
    assert [stream.push(i) for i in ids] == ["a", "", "", "", "🙂", "b"]
    assert stream.flush() == ""
    stream = tokenizer.stream_decoder()
    assert "".join(stream.push(i) for i in ids[:3]) == "a"
    assert stream.flush() == "\ufffd"


@pytest.mark.parametrize("source", ["json", "plain", "normalised"])
def test_joined_stream_is_the_whole_text(tokenizer: Tokenizer, source: str) -> None:
    if source != "json":
        tokenizer = from_gguf(spm_keys(source))
    rng = random.Random(1)
    for _ in range(200):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(15))]
        stream = tokenizer.stream_decoder()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


# --- GGUF -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_byte_level_equals_tokenizer_json(tokenizer: Tokenizer, text: str) -> None:
    twin = from_gguf(gguf_keys())
    assert twin.encode(text) == tokenizer.encode(text)
    assert twin.decode(twin.encode(text)) == text
    assert twin.encode("<|eot_id|>") == tokenizer.encode("<|eot_id|>")
    assert twin.encode("<|eot_id|>", parse_special=True) == [BOS, EOT]


def test_gguf_file_without_pre_is_llama_3(tmp_path: Path) -> None:
    made = make_gguf(tmp_path / "m.gguf")
    tokenizer = Tokenizer.from_checkpoint(open_checkpoint(made.path))
    assert tokenizer.adds_bos
    assert tokenizer.chat_template is not None
    assert tokenizer.special_tokens == {"bos_token": SPECIALS[0], "eos_token": SPECIALS[1]}
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "wanted"),
    [
        (None, ["123", "4", "56", "7", "\n\n"]),  # absent: Llama 3, whose digits come in threes
        ("llama-bpe", ["123", "4", "56", "7", "\n\n"]),
        ("gpt-2", ["1234", "567", "\n", "\n"]),
        ("qwen2", ["1", "2", "3", "4", "5", "6", "7", "\n\n"]),
        ("smollm", ["1", "2", "3", "4", "5", "6", "7", "\n", "\n"]),
    ],
)
def test_gguf_pre_tokenizers_cut_differently(pre: str | None, wanted: list[str]) -> None:
    tokens, _ = vocabulary(259)
    newline = tokens[10]
    tokens = [*tokens, "12", "123", "1234", "56", "567", newline * 2]
    merges = ["1 2", "12 3", "123 4", "5 6", "56 7", f"{newline} {newline}"]
    keys = gguf_keys(tokens=tokens, merges=merges, pre=pre, token_type=None, bos_token_id=None)
    tokenizer = from_gguf({k: v for k, v in keys.items() if not k.endswith("eos_token_id")})
    ids = tokenizer.encode("1234567\n\nx")[:-1]
    assert [tokenizer.decode([i]) for i in ids] == wanted


def test_llama_3_takes_a_word_that_is_a_token_whole() -> None:
    tokens = [*vocabulary(259)[0], "zzz"]
    named = {"bos_token_id": 256, "eos_token_id": 257, "add_bos_token": None}
    keys = gguf_keys(tokens=tokens, merges=[], token_type=None, **named)
    assert len(from_gguf(keys | {"tokenizer.ggml.pre": "gpt-2"}).encode("zzz")) == 3
    del keys["tokenizer.ggml.pre"]
    assert from_gguf(keys).encode("zzz") == [256, 259], "Llama 3 adds BOS unless told otherwise"


@pytest.mark.parametrize("kind", ["plain", "normalised"])
def test_sentencepiece_file_equals_the_library(tmp_path: Path, kind: str) -> None:
    raw = (DATA / f"spm_{kind}.model").read_bytes()
    tokenizer = from_files(tmp_path, tokenizer__model=raw)
    library = sentencepiece.SentencePieceProcessor(model_proto=raw)
    texts = [*TEXTS, "ﬁne naïve café", "<0x41> </s> <unk>", "the fox  jumps "]
    rng = random.Random(2)
    texts += ["".join(rng.choices("the fox jumé🙂\n", k=20)) for _ in range(300)]
    for text in texts:
        if "\0" in text:
            continue  # the library ends a text there
        assert tokenizer.encode(text)[1:] == library.encode(text), repr(text)
        ids = library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)
    separator = tokenizer.token_to_id("<sep>")
    assert tokenizer.encode("a<sep>b").count(separator) == 1, "user-defined symbols stay whole"
    assert tokenizer.encode("x")[0] == tokenizer.bos_token_id == 1
    assert tokenizer.special_tokens["eos_token"] == "</s>"


def test_gguf_sentencepiece_equals_the_file(tmp_path: Path) -> None:
    raw = (DATA / "spm_plain.model").read_bytes()
    twin = from_files(tmp_path, tokenizer__model=raw)
    tokenizer = from_gguf(spm_keys())
    for text in TEXTS:
        assert tokenizer.encode(text) == twin.encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("</s>", parse_special=True) == [1, 2]
    assert 2 not in tokenizer.encode("</s>")
    bare = from_gguf(spm_keys(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert bare.decode(bare.encode("the fox")) == "the fox"
    assert bare.encode("the")[-1] == 2
    assert bare.encode("the")[:-1] != twin.encode("the", add_special_tokens=False)


def test_continuation_keeps_the_space_that_a_text_would_lose() -> None:
    tokenizer = from_gguf(spm_keys())
    prompt, answer = tokenizer.encode("the quick"), tokenizer.encode(" brown", False)[1:]
    stream = tokenizer.stream_decoder(after=prompt)
    assert "".join(map(stream.push, answer)) == " brown"
    stream = tokenizer.stream_decoder(after=[*prompt, 2])
    assert "".join(map(stream.push, answer)) == "brown"


def test_sentencepiece_with_tokens_added_by_hugging_face(tmp_path: Path) -> None:
    raw = (DATA / "spm_plain.model").read_bytes()
    size = len(spm_keys()["tokenizer.ggml.tokens"])
    tokenizer = from_files(
        tmp_path,
        tokenizer__model=raw,
        added_tokens__json={"<pad>": size},
        tokenizer_config__json={"pad_token": "<pad>", "add_bos_token": False},
    )
    assert tokenizer.token_to_id("<pad>") == size
    assert not tokenizer.adds_bos
    with pytest.raises(CheckpointError, match="added token '<pad>' has id"):
        from_files(tmp_path, tokenizer__model=raw, added_tokens__json={"<pad>": size + 7})


def test_sentencepiece_unigram_is_refused(tmp_path: Path) -> None:
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString((DATA / "spm_plain.model").read_bytes())
    model.trainer_spec.model_type = 1
    with pytest.raises(UnsupportedModelError, match="model type 1, wanted BPE"):
        from_files(tmp_path, tokenizer__model=model.SerializeToString())


def test_missing_sentencepiece_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sentencepiece", None)
    raw = (DATA / "spm_plain.model").read_bytes()
    with pytest.raises(UnsupportedModelError, match=r"pip install 'bitnet-ext\[sentencepiece\]'"):
        from_files(tmp_path, tokenizer__model=raw)


def test_dropout_and_padding_of_training_are_switched_off(tmp_path: Path) -> None:
    content = tokenizer_json(320)
    content["model"]["dropout"] = 0.9
    content["truncation"] = {
        "max_length": 3,
        "strategy": "LongestFirst",
        "stride": 0,
        "direction": "Right",
    }
    tokenizer = from_files(
        tmp_path, tokenizer__json=content, tokenizer_config__json=tokenizer_config()
    )
    assert len({tuple(tokenizer.encode(TEXT)) for _ in range(5)}) == 1
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
