"""Structure-aware damage to checkpoints: each function changes one field of a sound one.

A sample is taken apart (``Hf``: JSON files and tensors; ``make_gguf.Gguf``: keys and tensors),
damaged in one to three places, and put together again.  Most damage keeps the container whole, so
that it reaches the code behind the header; some is done to the finished bytes.
"""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from make_gguf import ARRAY, F32, I32, STRING, U32, Gguf

Rng = random.Random
SIZES = [0, 1, 2, 3, 7, 31, 32, 63, 64, 127, 128, 255, 256, 257, 1 << 16, 1 << 20, 1 << 24]
SIZES += [(1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 63) - 1]
HUGE = [*SIZES, 1 << 63, (1 << 64) - 32, (1 << 64) - 1]
FLOATS = [0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e30, 3e38, float("inf"), float("-inf")]
TEXTS = ["", " ", "a", "\0", "..", "/", "é", "\U0001f600", "\ud7ff", "x" * 300, "x" * 70_000]
JSON = [None, True, False, 0, 1, -1, 2, 1.5, 1e300, "", "x", [], [1], {}, {"a": 1}, *SIZES, *TEXTS]


def near(rng: Rng, value: int) -> int:
    """Another integer: a neighbour, a multiple, or a notorious one."""
    ways: list[Callable[[], int]] = [
        lambda: value + rng.choice([-2, -1, 1, 2, 4, 32]),
        lambda: value * rng.choice([2, 3, 4, 256]),
        lambda: value // 2,
        lambda: rng.choice(HUGE),
    ]
    return max(rng.choice(ways)(), 0)


def flip(rng: Rng, raw: bytes, start: int = 0, stop: int | None = None) -> bytes:
    """One to four bytes changed, or a run of them overwritten."""
    out = bytearray(raw)
    stop = len(out) if stop is None else stop
    if stop <= start:
        return raw
    for _ in range(rng.randint(1, 4)):
        out[rng.randrange(start, stop)] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)])
    return bytes(out)


def cut(rng: Rng, raw: bytes) -> bytes:
    """Truncated, or longer than promised."""
    if rng.random() < 0.2:
        return raw + bytes(rng.choice([1, 7, 32, 4096]))
    return raw[: rng.randrange(len(raw))]


def damage_values(rng: Rng, raw: bytes) -> bytes:
    """Values of a tensor: codes of 3, floats that are none."""
    if not raw:
        return raw
    out = bytearray(raw)
    pattern = rng.choice(
        [
            b"\xff", b"\x03", b"\xc0", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x80\x7f",
            b"\xc0\xff", b"\x00\x7c", b"\x00\xfe", b"\x00\x80", b"\x00\x00\x00\x00",
            struct.pack("<f", rng.choice(FLOATS)), bytes([rng.randrange(256)]),
        ]
    )  # fmt: skip
    at = rng.choice([0, len(out) - len(pattern), rng.randrange(len(out))])
    at = max(at - at % len(pattern), 0)
    out[at : at + len(pattern)] = pattern
    return bytes(out[: len(raw)])


# Hugging Face directories


@dataclass
class Hf:
    """JSON files by name, and tensors by name: dtype, shape, data."""

    files: dict[str, Any]
    tensors: dict[str, list[Any]] = field(default_factory=dict)
    name: str = "model.safetensors"

    @classmethod
    def read(cls, directory: Path) -> Hf:
        files = {p.name: json.loads(p.read_text()) for p in directory.glob("*.json")}
        raw = (directory / "model.safetensors").read_bytes()
        size = int.from_bytes(raw[:8], "little")
        header = json.loads(raw[8 : 8 + size])
        header.pop("__metadata__", None)
        found = cls(files)
        for name, entry in header.items():
            start, end = (8 + size + o for o in entry["data_offsets"])
            found.tensors[name] = [entry["dtype"], entry["shape"], raw[start:end]]
        return found

    def entries(self) -> dict[str, Any]:
        """The header that fits the data."""
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for name, (dtype, shape, data) in self.tensors.items():
            ends = [offset, offset + len(data)]
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": ends}
            offset = ends[1]
        return header

    def join(self, header: Any) -> bytes:
        text = json.dumps(header).encode()
        data = b"".join(data for _, _, data in self.tensors.values())
        return len(text).to_bytes(8, "little") + text + data

    def write(self, directory: Path, weights: bytes | None = None) -> None:
        for old in directory.iterdir():
            old.unlink()
        for name, value in self.files.items():
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            (directory / name).write_bytes(raw)
        (directory / self.name).write_bytes(
            self.join(self.entries()) if weights is None else weights
        )


WIDTHS = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8, "I32": 4, "BOOL": 1}


def _refit(rng: Rng, sample: Hf, name: str) -> None:
    """Another dtype or shape, with data to fit, so that the header stays true."""
    dtype, shape, data = sample.tensors[name]
    if rng.random() < 0.5:
        dtype = rng.choice(sorted(WIDTHS))
    else:
        ways = [shape[::-1], [*shape, 1], [1, *shape], shape[:-1], [2 * n for n in shape], [0]]
        shape = rng.choice(ways)
    size = WIDTHS[dtype] * int(np.prod(shape, dtype=np.int64))
    sample.tensors[name] = [dtype, shape, (data * (size // max(len(data), 1) + 1))[:size]]


def _rename(rng: Rng, sample: Hf, name: str) -> None:
    new = rng.choice([*TEXTS[:10], name + "x", name.upper(), rng.choice(list(sample.tensors))])
    sample.tensors[new] = sample.tensors.pop(name)


def _values(rng: Rng, sample: Hf, name: str) -> None:
    sample.tensors[name][2] = damage_values(rng, sample.tensors[name][2])


def safetensors_input(rng: Rng, sample: Hf, directory: Path) -> None:
    """Damage to model.safetensors."""
    sample = copy.deepcopy(sample)
    header: Any = None
    for _ in range(rng.choice([1, 1, 2, 3])):
        name = rng.choice(list(sample.tensors))
        scales = [n for n in sample.tensors if n.endswith("scale")]
        way = rng.random()
        if way < 0.45:
            _values(rng, sample, rng.choice(scales) if rng.random() < 0.4 and scales else name)
        elif way < 0.65:
            _refit(rng, sample, name)
        elif way < 0.72:
            _rename(rng, sample, name)
        elif way < 0.76:
            del sample.tensors[name]
        else:
            header = header or sample.entries()
            _lie(rng, header.setdefault(name, {}))
    raw = sample.join(sample.entries() if header is None else header)
    size = 8 + int.from_bytes(raw[:8], "little")
    way = rng.random()
    if way < 0.05:
        raw = cut(rng, raw)
    elif way < 0.10:
        raw = flip(rng, raw, 8, size)
    elif way < 0.13:
        raw = rng.choice(HUGE).to_bytes(8, "little") + raw[8:]
    sample.write(directory, raw)


def _lie(rng: Rng, entry: dict[str, Any]) -> None:
    """One field of a header entry, without moving the data."""
    key = rng.choice(["dtype", "shape", "data_offsets"])
    value = entry.get(key)
    if rng.random() < 0.15:
        entry[rng.choice([key, "extra"])] = rng.choice(JSON)
    elif isinstance(value, list) and value:
        at = rng.randrange(len(value))
        entry[key] = [*value[:at], near(rng, value[at]), *value[at + 1 :]]
    else:
        entry[key] = rng.choice([*WIDTHS, "F8_E4M3", "f32", ""])


BENIGN: dict[str, list[Any]] = {
    "eos_token_id": [3, [1, 2], None, -1],
    "rope_theta": [1.0, 1e4, 5e5, 1e9],
    "rms_norm_eps": [1e-30, 1e-6, 1.0],
    "hidden_act": ["relu2", "silu", "gelu", "gelu_new"],
    "max_position_embeddings": [1, 2048, 1 << 24],
    "rope_scaling": [None, {"type": "linear", "factor": 4.0}, {"rope_type": "default"}],
    "unheard_of": JSON,
    "torch_dtype": JSON,
    "head_dim": [None, 16, 64],
    "architectures": [["BitNetForCausalLM"], ["LlamaForCausalLM"], None, []],
    "tie_word_embeddings": [True, False],
}


def config_input(rng: Rng, sample: Hf, directory: Path) -> None:
    """Damage to config.json, generation_config.json and the index."""
    sample = copy.deepcopy(sample)
    config = sample.files["config.json"]
    for _ in range(rng.choice([1, 1, 2, 3])):
        way = rng.random()
        if way < 0.45:
            key = rng.choice(list(BENIGN))
            config[key] = rng.choice(BENIGN[key])
        elif way < 0.65:
            _replace(rng, config, rng.choice(list(config)))
        elif way < 0.72:
            config.pop(rng.choice(list(config)), None)
        elif way < 0.80 and isinstance(config.get("quantization_config"), dict):
            section = config["quantization_config"]
            key = rng.choice([*section, "modules_to_not_convert", "use_rms_norm", "rms_norm_eps"])
            _replace(rng, section, key)
        elif way < 0.88:
            _replace(rng, sample.files.setdefault("generation_config.json", {}), "eos_token_id")
        else:
            _index(rng, sample)
    if rng.random() < 0.06:
        name = rng.choice(["config.json", "generation_config.json"])
        raw = json.dumps(sample.files.get(name, {})).encode()
        sample.files[name] = rng.choice([flip, cut])(rng, raw)
    sample.write(directory)


def _replace(rng: Rng, values: dict[str, Any], key: str) -> None:
    old = values.get(key)
    if type(old) is int and rng.random() < 0.6:
        values[key] = near(rng, old)
    else:
        values[key] = rng.choice(JSON)


def _index(rng: Rng, sample: Hf) -> None:
    """Put the file under an index, true but for one entry."""
    shard = sample.name = "model-00001-of-00001.safetensors"
    weight_map: dict[str, Any] = dict.fromkeys(sample.tensors, shard)
    way, name = rng.random(), rng.choice(list(weight_map))
    tricks = ["../x.safetensors", "/x.safetensors", "config.json", "none.safetensors", *JSON]
    if way < 0.3:
        weight_map[name] = rng.choice(tricks)
    elif way < 0.4:
        del weight_map[name]
    elif way < 0.5:
        weight_map["ghost"] = shard
    index: Any = {"weight_map": weight_map if way < 0.95 else rng.choice(JSON)}
    sample.files["model.safetensors.index.json"] = index


# GGUF files


def gguf_input(rng: Rng, sample: Gguf, path: Path) -> None:
    """Damage to keys, tensor entries and values of a GGUF file."""
    file = copy.deepcopy(sample)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(file.tensors))
        name, kind, shape, data = file.tensors[at]
        way = rng.random()
        if way < 0.40:
            file.tensors[at] = (name, kind, shape, damage_values(rng, data))
        elif way < 0.60:
            _key(rng, file, rng.randrange(len(file.keys)))
        elif way < 0.70:
            kinds = [0, 1, 2, 8, 14, 24, 30, 34, 35, 36, 37, 38, rng.randrange(1 << 32)]
            file.tensors[at] = (name, rng.choice(kinds), shape, data)
        elif way < 0.80:
            ways = [shape[::-1], (*shape, 1), shape[:-1], tuple(near(rng, n) for n in shape)]
            file.tensors[at] = (name, kind, rng.choice(ways), data)
        elif way < 0.86:
            other = rng.choice([*TEXTS, name + "x", rng.choice(file.tensors)[0]])
            file.tensors[at] = (other, kind, shape, data)
        elif way < 0.90:
            file.tensors[at] = (name, kind, shape, cut(rng, data) if data else b"")
        elif way < 0.94:
            file.keys.append(("general.alignment", U32, rng.choice(SIZES[:17])))
        else:
            file.tensors.append((rng.choice(["rope_freqs.weight", "blk.0.attn_q.scale", "x"]),
                                 rng.choice([0, 1]), (rng.choice([1, 16, 32]),),
                                 struct.pack("<f", rng.choice(FLOATS)) * 32))  # fmt: skip
    _finish(rng, file, path)


def _key(rng: Rng, file: Gguf, at: int) -> None:
    """Another value, another type, another name, or the key gone or twice."""
    key, kind, value = file.keys[at]
    way = rng.random()
    if way < 0.4 and type(value) is int:
        file.keys[at] = (key, kind, near(rng, value) % (1 << 32))
    elif way < 0.5:
        file.keys[at] = (key, F32, rng.choice([*FLOATS[:7], 5e5, 1e-5]))
    elif way < 0.6:
        file.keys[at] = (key, STRING, rng.choice(TEXTS))
    elif way < 0.7:
        file.keys[at] = (key, ARRAY, (I32, [rng.choice([-1, 0, 1, 2, 64])] * rng.randrange(4)))
    elif way < 0.8:
        file.keys[at] = (key + "x", kind, value)
    elif way < 0.9:
        del file.keys[at]
        file.keys = file.keys or [("x", STRING, "")]
    else:
        file.keys.append(file.keys[at])


def _finish(rng: Rng, file: Gguf, path: Path) -> None:
    """Write the file; now and then with damage to the finished bytes."""
    file.keys = [(k, t, v) for k, t, v in file.keys]
    raw = file.bytes()
    way = rng.random()
    if way < 0.03:
        raw = cut(rng, raw)
    elif way < 0.08:
        raw = flip(rng, raw, 0, min(len(raw), 1500))
    elif way < 0.10:
        raw = raw[:8] + struct.pack("<Q", rng.choice(HUGE)) + raw[16:]
    elif way < 0.12:
        raw = raw[:16] + struct.pack("<Q", rng.choice(HUGE)) + raw[24:]
    path.write_bytes(raw)


def vocabulary_input(rng: Rng, sample: Gguf, path: Path) -> None:
    """Damage to the tokenizer.* keys of a GGUF file."""
    file = copy.deepcopy(sample)
    for _ in range(rng.choice([1, 1, 2, 3])):
        places = [i for i, k in enumerate(file.keys) if k[0].startswith("tokenizer.")]
        if not places:
            break
        at = rng.choice(places)
        key, kind, value = file.keys[at]
        if kind == ARRAY and value[1] and rng.random() < 0.7:
            file.keys[at] = (key, kind, (value[0], _items(rng, value[0], list(value[1]))))
        elif kind == STRING and rng.random() < 0.5:
            names = ["gpt2", "llama", "bert", "t5", "llama-bpe", "gpt-2", "default", *TEXTS]
            file.keys[at] = (key, kind, rng.choice(names))
        else:
            _key(rng, file, at)
    if rng.random() < 0.2:
        file.keys.append(("tokenizer.ggml.pre", STRING, rng.choice(["llama-bpe", "x", "qwen2"])))
    _finish(rng, file, path)


def _items(rng: Rng, inner: int, items: list[Any]) -> list[Any]:
    """One entry of a list changed, doubled, dropped, or the list cut."""
    at, way = rng.randrange(len(items)), rng.random()
    if way < 0.2:
        return items[:at]
    if way < 0.35:
        return items[:at] + items[at + 1 :]
    if way < 0.5:
        return [*items, items[at]]
    if inner == STRING:
        texts = [*TEXTS, items[at] + " ", " " + items[at], items[at] * 2, rng.choice(items)]
        items[at] = rng.choice(texts)
    elif inner == F32:
        items[at] = rng.choice(FLOATS[:8])
    else:
        items[at] = rng.choice([-(1 << 31), -1, 0, 1, 2, 3, 4, 5, 6, 7, 100, (1 << 31) - 1])
    return items
