"""Hostile GGUF files: CheckpointError each, no crash, bounded memory."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import load_fully, refused
from make_gguf import ARRAY, BOOL, F32, I32, STRING, U8, U32, U64, Gguf, make_gguf, string

from bitnet_ext.checkpoint.gguf import GgufFile

F64 = 12
ARCH = "bitnet-b1.58"


def tiny(weights: str = "i2_s", arch: str = ARCH, vocabulary: bool = False) -> Gguf:
    """A file of one layer in parts that can be bent."""
    made = _tiny(weights, arch, vocabulary)
    return Gguf(list(made.keys), list(made.tensors))


@cache
def _tiny(weights: str, arch: str, vocabulary: bool) -> Gguf:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.gguf"
        make_gguf(path, arch, weights=weights, embedding="f16", layers=1)
        read = GgufFile(path)
        file = Gguf()
        for tensor in read.tensors.values():
            data = read.raw(tensor.name).tobytes()
            file.tensors.append((tensor.name, tensor.type, tensor.shape, data))
        for key, value in read.metadata.items():
            if key.startswith("tokenizer.") and not vocabulary:
                continue
            file.keys.append((key, *_typed(value)))
    return file


def _typed(value: Any) -> tuple[int, Any]:
    if isinstance(value, str):
        return STRING, value
    if isinstance(value, bool):
        return BOOL, value
    if isinstance(value, int):
        return U32, value
    if isinstance(value, float):
        return F32, value
    if isinstance(value, np.ndarray):
        return ARRAY, (F32 if value.dtype.kind == "f" else I32, value.tolist())
    return ARRAY, (STRING, value)


def key_at(file: Gguf, key: str) -> int:
    return next(i for i, k in enumerate(file.keys) if k[0] == key)


def set_key(file: Gguf, key: str, kind: int, value: Any) -> None:
    file.keys[key_at(file, key)] = (key, kind, value)


def tensor_at(file: Gguf, name: str) -> int:
    return next(i for i, t in enumerate(file.tensors) if t[0] == name)


def check(tmp_path: Path, file: Gguf | bytes, match: str, **options: Any) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(file if isinstance(file, bytes) else file.bytes())
    refused(path, match, **options)


def test_the_unbent_file_loads(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(tiny(vocabulary=True).bytes())
    load_fully(tmp_path / "m.gguf", tokenizer=True)


def test_truncated_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(tiny().bytes())
    read = GgufFile(path)
    raw = path.read_bytes()
    first = min(t.start for t in read.tensors.values())
    ends = {t.end for t in read.tensors.values()}
    for cut in sorted({*range(0, first + 1, 7), *ends, *(e - 1 for e in ends)} - {max(ends)}):
        path.write_bytes(raw[:cut])
        refused(path, r"m\.gguf")


# The container


def header(tensors: int = 0, keys: int = 0, version: int = 3, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + rest


def one_key(kind: int, value: bytes, key: bytes = b"k") -> bytes:
    return header(keys=1, rest=string(key) + struct.pack("<I", kind) + value + bytes(64))


HUGE = (1 << 20, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"GGUG" + header()[4:], "found the magic b'GGUG'"),
        (b"FUGG" + header()[4:], "found the magic"),
        (header(version=1), "found GGUF version 1"),
        (header(version=4), "found GGUF version 4"),
        (header(version=3 << 24), "big-endian"),
        (header(version=0), "found GGUF version 0"),
        *((header(tensors=n, rest=bytes(200)), "found .* tensors and") for n in HUGE),
        *((header(keys=n, rest=bytes(200)), "tensors and .* keys") for n in HUGE),
        *((header(keys=1, rest=struct.pack("<Q", n) + bytes(90)), "metadata key") for n in HUGE),
        *((one_key(STRING, struct.pack("<Q", n)), "k: wanted .* bytes") for n in HUGE),
        *((one_key(ARRAY, struct.pack("<IQ", U8, n)), "k: wanted .* bytes") for n in HUGE),
        *((one_key(ARRAY, struct.pack("<IQ", F64, n)), "k: wanted .* bytes") for n in HUGE),
        *((one_key(ARRAY, struct.pack("<IQ", STRING, n)), "k: found an array of") for n in HUGE),
        *((one_key(ARRAY, struct.pack("<IQ", ARRAY, n)), "k: found an array of") for n in HUGE),
        (one_key(ARRAY, struct.pack("<IQQ", STRING, 2, 1 << 63)), "k: string 0 ends at"),
        (one_key(ARRAY, struct.pack("<IQQ", STRING, 2, (1 << 64) - 8)), "k: string 0 ends at"),
        (one_key(ARRAY, struct.pack("<IQ", 13, 1)), "value type 13"),
        (one_key(ARRAY, struct.pack("<IQ", 1 << 31, 1)), "value type 2147483648"),
        (one_key(13, b""), "value type 13"),
        (one_key(BOOL, b"\2"), "boolean 2"),
        (one_key(ARRAY, struct.pack("<IQ", BOOL, 3) + b"\0\1\xff"), "boolean 255"),
        (one_key(STRING, string(b"\xff\xfe")), "not UTF-8"),
        (one_key(ARRAY, struct.pack("<IQ", STRING, 1) + string(b"\x80")), "not UTF-8"),
        (one_key(U8, b"\0", key=b"\xc3\x28"), "not UTF-8"),
        (one_key(U8, b"\0", key=b"k" * 70_000), "a string of 70000 bytes"),
        (header(keys=2, rest=(string("k") + struct.pack("<IB", U8, 1)) * 2 + bytes(64)), "twice"),
        (one_key(ARRAY, struct.pack("<IQ", ARRAY, 1) * 9 + bytes(64)), "nested deeper"),
    ],
)
def test_the_container_lies(tmp_path: Path, raw: bytes, match: str) -> None:
    check(tmp_path, raw, match)


def test_many_small_arrays(tmp_path: Path) -> None:
    """Arrays of empty arrays: each costs an object, so there is a limit for a file."""
    inner = struct.pack("<IQ", U8, 0)
    raw = one_key(ARRAY, struct.pack("<IQ", ARRAY, 4_100_000) + inner * 10)
    check(tmp_path, raw + bytes(4_100_000 * 12), "more than 4000000 strings and arrays")


@pytest.mark.parametrize(
    ("kind", "value"),
    [(U32, 0), (U32, 7), (U32, 12), (U32, 1 << 31), (I32, -32), (F32, 32.0), (STRING, "32")],
)
def test_alignment_lies(tmp_path: Path, kind: int, value: Any) -> None:
    file = tiny()
    file.keys.append(("general.alignment", kind, value))
    check(tmp_path, file, r"general\.alignment: found")


def bend_tensor(file: Gguf, name: str, **changes: Any) -> bytes:
    """The file's bytes with one tensor's rank, extents, type or offset overwritten."""
    raw = bytearray(file.bytes())
    _, _, shape, _ = file.tensors[tensor_at(file, name)]
    at = raw.index(string(name)) + 8 + len(name)
    fields = {
        "rank": (at, "<I"),
        "extent": (at + 4, "<Q"),
        "kind": (at + 4 + 8 * len(shape), "<I"),
        "offset": (at + 8 + 8 * len(shape), "<Q"),
    }
    for field, value in changes.items():
        where, form = fields[field]
        struct.pack_into(form, raw, where, value)
    return bytes(raw)


NAME = "blk.0.attn_q.weight"


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rank": 5}, "found rank 5"),
        ({"rank": (1 << 32) - 1}, "found rank"),
        ({"rank": 0}, "."),
        ({"rank": 1}, "."),
        ({"extent": 0}, "attn_q"),
        ({"extent": 1 << 63}, "attn_q"),
        ({"extent": (1 << 64) - 256}, "attn_q"),
        ({"extent": 128}, "attn_q"),
        ({"extent": 1 << 40}, "attn_q"),
        ({"kind": 31}, r"unknown \(31\) is not read"),
        ({"kind": (1 << 32) - 1}, "is not read"),
        ({"kind": 0}, "attn_q|overlap"),
        ({"kind": 24}, "overlap"),
        ({"offset": 1}, "multiple of 32"),
        ({"offset": 0}, "overlap"),
        ({"offset": 1 << 63}, "attn_q"),
        ({"offset": (1 << 64) - 32}, "attn_q"),
    ],
)
def test_tensor_entries_lie(tmp_path: Path, changes: dict[str, int], match: str) -> None:
    check(tmp_path, bend_tensor(tiny(), NAME, **changes), match)


def test_names_twice_missing_and_foreign(tmp_path: Path) -> None:
    for i, (name, kind, shape, data) in enumerate(tiny().tensors):
        file = tiny()
        file.tensors[i] = ("other", kind, shape, data)
        check(tmp_path, file, name.replace(".", r"\."))
    file = tiny()
    file.tensors.append(file.tensors[3])
    check(tmp_path, file, "stands twice")
    file = tiny()
    file.tensors.append(("blk.7.attn_q.weight", 0, (1,), bytes(4)))
    check(tmp_path, file, r"blk\.7.* is not part of")
    file.tensors[-1] = ("x" * 60_000, 0, (1,), bytes(4))
    check(tmp_path, file, "is not part of")


# Metadata


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("embedding_length", [(U32, 0), (U32, 257), (U64, 1 << 62), (I32, -256), (F32, 256.0)]),
        ("block_count", [(U32, 0), (U32, 2), (U32, 1 << 29), (STRING, "1"), (BOOL, True)]),
        ("attention.head_count", [(U32, 0), (U32, 3), (U32, 1 << 30), (ARRAY, (U32, []))]),
        ("attention.head_count", [(ARRAY, (U32, [4, 2])), (ARRAY, (F32, [4.0]))]),
        ("attention.head_count_kv", [(U32, 3), (U32, 0), (ARRAY, (STRING, ["1"]))]),
        ("feed_forward_length", [(U32, 700), (ARRAY, (U32, [768, 0])), (F64, float("nan"))]),
        ("context_length", [(U32, 0), (U32, (1 << 32) - 1), (STRING, "many")]),
        ("vocab_size", [(U32, 319), (U32, 1 << 30), (U64, 1 << 63)]),
        ("rope.dimension_count", [(U32, 32), (U32, 0), (ARRAY, (U32, [64]))]),
        ("rope.freq_base", [(F32, 0.0), (F32, -1.0), (F32, float("nan")), (F32, float("inf"))]),
        ("attention.layer_norm_rms_epsilon", [(F32, 0.0), (F32, float("nan")), (U32, 0)]),
    ],
)
def test_keys_lie(tmp_path: Path, key: str, values: list[tuple[int, Any]]) -> None:
    for kind, value in values:
        file = tiny()
        set_key(file, f"{ARCH}.{key}", kind, value)
        check(tmp_path, file, "wanted|layers of different shape")
    file = tiny()
    del file.keys[key_at(file, f"{ARCH}.{key}")]
    if key in ("embedding_length", "block_count", "attention.head_count", "feed_forward_length"):
        check(tmp_path, file, f"{key}: found None")


@pytest.mark.parametrize(
    ("key", "kind", "value", "match"),
    [
        ("general.architecture", STRING, "x" * 100_000, r"general\.architecture"),
        ("general.architecture", ARRAY, (STRING, [ARCH]), r"general\.architecture"),
        (f"{ARCH}.expert_count", U32, 8, "mixtures of experts"),
        (f"{ARCH}.rope.scaling.type", STRING, "yarn", "'yarn' does not run"),
        (f"{ARCH}.rope.scaling.type", U32, 1, "wanted a string"),
        (f"{ARCH}.attention.key_length", U32, 63, "wanted"),
        (f"{ARCH}.attention.value_length", U32, 32, "wanted the head size"),
        ("tokenizer.ggml.eos_token_id", STRING, "</s>", "wanted a token id"),
        ("tokenizer.ggml.eos_token_id", ARRAY, (U32, [1, 2]), "wanted a token id"),
        ("tokenizer.ggml.bos_token_id", F32, 1.0, "wanted a token id"),
    ],
)
def test_other_keys_lie(tmp_path: Path, key: str, kind: int, value: Any, match: str) -> None:
    file = tiny()
    file.keys = [k for k in file.keys if k[0] != key] + [(key, kind, value)]
    check(tmp_path, file, match)


def test_rope_factors_lie(tmp_path: Path) -> None:
    cases = [(0, (32,), np.full(32, np.nan)), (0, (31,), np.ones(31)), (1, (64,), np.ones(32))]
    for kind, shape, values in cases:
        file = tiny("tq2_0", "llama")
        file.tensors.append(("rope_freqs.weight", kind, shape, values.astype("<f4").tobytes()))
        check(tmp_path, file, r"rope_freqs\.weight")


# Values


def poke(weights: str, data: bytes, at: int, name: str = NAME, arch: str = ARCH) -> Gguf:
    """Overwrite bytes of a tensor; a negative place counts from its end."""
    file = tiny(weights, arch)
    i = tensor_at(file, name)
    name, kind, shape, old = file.tensors[i]
    raw = bytearray(old)
    at %= len(raw)
    raw[at : at + len(data)] = data
    file.tensors[i] = (name, kind, shape, bytes(raw))
    return file


BAD = (np.nan, np.inf, -np.inf, 0.0, -1.0)


@pytest.mark.parametrize("value", BAD)
def test_scales_that_are_no_positive_number(tmp_path: Path, value: float) -> None:
    single, half = np.float32(value).tobytes(), np.float16(value).tobytes()
    match = r"attn_q\.weight: found (the scale|a block of scale 0)"
    check(tmp_path, poke("i2_s", single, -32), match)
    for kind, size in (("tq1_0", 54), ("tq2_0", 66)):
        for block in (0, 5, 255):
            check(tmp_path, poke(kind, half, size * block + size - 2), match)
    file = tiny()
    file.tensors.append(("blk.0.attn_q.scale", 0, (1,), single))
    check(tmp_path, file, r"attn_q\.scale: found the scale")
    file.tensors[-1] = ("blk.0.attn_q.scale", 0, (2,), single * 2)
    check(tmp_path, file, r"attn_q\.scale.*wanted F32")


@pytest.mark.parametrize("shift", [0, 2, 4, 6])
def test_code_three(tmp_path: Path, shift: int) -> None:
    check(tmp_path, poke("i2_s", bytes([3 << shift]), 777), r"layers\.0\.q|attn_q")
    check(tmp_path, poke("tq2_0", bytes([3 << shift]), 66 * 7 + 5), r"layers\.0\.q|attn_q")
    for layout in ("arm", "rows4"):
        file = poke(f"i2_s_{layout}", bytes([3 << shift]), 777)
        check(tmp_path, file, r"layers\.0\.q|attn_q", i2s_layout=layout)


def test_every_tq1_0_byte_is_ternary(tmp_path: Path) -> None:
    """Base-3 digits cannot hold a fourth value: any byte loads, as in ggml."""
    path = tmp_path / "m.gguf"
    for byte in range(0, 256, 15):
        path.write_bytes(poke("tq1_0", bytes([byte] * 48), 54 * 3).bytes())
        load_fully(path)


@pytest.mark.parametrize("weights", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_latent_weights_that_are_not_finite(tmp_path: Path, weights: str, value: float) -> None:
    raw = np.array([value], np.float16 if weights == "f16" else np.float32).tobytes()
    raw = raw[2:] if weights == "bf16" else raw
    check(tmp_path, poke(weights, raw, 128), r"layers\.0\.q|attn_q")
    check(tmp_path, poke(weights, raw, 128, arch="llama"), r"layers\.0\.q|attn_q")


def test_norms_that_are_not_finite(tmp_path: Path) -> None:
    name = "blk.0.ffn_sub_norm.weight"
    file = poke("i2_s", np.float32(np.nan).tobytes(), 40, name)
    check(tmp_path, file, r"ffn_sub_norm\.weight: found nan at 10")


@pytest.mark.parametrize(("table", "at"), [("q4_0", 18), ("q8_0", 34), ("q6_k", 208), ("q4_k", 2)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_tables_whose_scales_are_not_finite(
    tmp_path: Path, table: str, at: int, value: float
) -> None:
    path = tmp_path / "m.gguf"
    make_gguf(path, embedding=table, layers=1)
    start = GgufFile(path).tensors["token_embd.weight"].start
    raw = bytearray(path.read_bytes())
    raw[start + at : start + at + 2] = np.float16(value).tobytes()
    check(tmp_path, bytes(raw), r"token_embd\.weight: .* wanted finite numbers")


# The vocabulary


@pytest.mark.parametrize(
    "edit",
    [
        lambda f: set_key(f, "tokenizer.ggml.tokens", ARRAY, (STRING, [])),
        lambda f: set_key(f, "tokenizer.ggml.tokens", ARRAY, (U32, [1, 2])),
        lambda f: set_key(f, "tokenizer.ggml.tokens", ARRAY, (STRING, ["a", "a"])),
        lambda f: set_key(f, "tokenizer.ggml.tokens", STRING, "abc"),
        lambda f: set_key(f, "tokenizer.ggml.merges", ARRAY, (STRING, ["nothere neither"])),
        lambda f: set_key(f, "tokenizer.ggml.merges", ARRAY, (STRING, ["", " ", "a"])),
        lambda f: set_key(f, "tokenizer.ggml.merges", U32, 1),
        lambda f: set_key(f, "tokenizer.ggml.token_type", ARRAY, (I32, [1])),
        lambda f: set_key(f, "tokenizer.ggml.token_type", ARRAY, (F32, [1.0] * 320)),
        lambda f: set_key(f, "tokenizer.ggml.scores", ARRAY, (F32, [0.0])),
        lambda f: set_key(f, "tokenizer.ggml.model", STRING, "wordpiece"),
        lambda f: set_key(f, "tokenizer.ggml.model", U32, 3),
        lambda f: set_key(f, "tokenizer.ggml.bos_token_id", U32, 1 << 31),
        lambda f: f.keys.append(("tokenizer.ggml.pre", STRING, "gemma4")),
        lambda f: f.keys.append(("tokenizer.ggml.pre", U32, 7)),
    ],
)
def test_the_vocabulary_lies(tmp_path: Path, edit: Callable[[Gguf], Any]) -> None:
    file = tiny(vocabulary=True)
    edit(file)
    check(tmp_path, file, r"tokenizer|token|m\.gguf", tokenizer=True)
