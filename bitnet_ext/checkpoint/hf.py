"""Hugging Face directories: packed, online (latent) and the package's own form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.families import Slot, hf_name, slots
from bitnet_ext.checkpoint.fields import Fields
from bitnet_ext.checkpoint.files import load_json, resolve_inside
from bitnet_ext.checkpoint.hf_config import parse_config
from bitnet_ext.checkpoint.safetensors import TensorInfo, TensorStore
from bitnet_ext.checkpoint.source import (
    Array,
    Checkpoint,
    FloatName,
    Table,
    TernaryKind,
    TernarySource,
)
from bitnet_ext.checkpoint.values import (
    as_float32,
    codes_from_floats,
    positive_scale,
    require_finite,
)
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["TOKENIZER_FILES", "HfCheckpoint"]

FLOATS: dict[str, FloatName] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".attn.masked_bias")
Form = Literal["packed", "latent", "plain"]


class HfCheckpoint(Checkpoint):
    """A directory with config.json and safetensors; every promise is checked at once.

    Raises:
        UnsupportedModelError: well formed, but not a ternary model that runs here.
        CheckpointError: files contradict each other or the format.
    """

    def __init__(self, directory: Path, filename: str | None = None) -> None:
        self.path = directory
        self.gguf_metadata = {}
        parsed = parse_config(
            load_json(resolve_inside(directory, "config.json")), str(directory / "config.json")
        )
        self.family, self._quantization = parsed.family, parsed.quantization
        self.generation_config = self._read_generation_config()
        stops = Fields(self.generation_config, str(directory / "generation_config.json"))
        ids = parsed.config.eos_token_ids + stops.token_ids("eos_token_id")
        self.config = replace(parsed.config, eos_token_ids=tuple(dict.fromkeys(ids)))
        self._store = TensorStore(directory, filename)
        self._forms: dict[str, Form] = {}
        self._slots = {}
        self._check()
        self.format = f"safetensors, {self.family}, " + (
            "/".join(sorted(set(self._forms.values()))) or "no linear layers"
        )

    def _read_generation_config(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return load_json(resolve_inside(self.path, path.name)) if path.exists() else {}

    # What config.json promises, against the headers.

    def _check(self) -> None:
        expected: set[str] = set()
        for slot in slots(self.config):
            name = hf_name(self.family, slot.name)
            if slot.kind == "linear":
                expected |= self._check_linear(slot, name)
            else:
                self._check_dense(slot, name)
                expected.add(name)
            self._slots[slot.name] = slot
        self._check_head()
        for name in self._store.files:
            tied = self.config.tie_word_embeddings and name == "lm_head.weight"
            if name not in expected and not tied and not name.endswith(IGNORED_ENDINGS):
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name[:200]!r} is not part of a {self.family} model of "
                    "this config.json; leaving it out would compute another model"
                )

    def _require(self, name: str, slot: Slot) -> TensorInfo:
        info = self._store.info(name)
        if info is None:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} is missing, wanted shape {list(slot.shape)}"
            )
        return info

    def _check_dense(self, slot: Slot, name: str) -> None:
        info = self._require(name, slot)
        if info.dtype in ("U8", "I8") and slot.kind == "table":
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r} is quantised ({info.dtype}); wanted F32, F16 or "
                "BF16: embeddings and heads stay dense here"
            )
        if info.shape != slot.shape or info.dtype not in FLOATS:
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: found {info.dtype} {list(info.shape)}, wanted "
                f"F32, F16 or BF16 {list(slot.shape)}"
            )

    def _check_linear(self, slot: Slot, name: str) -> set[str]:
        """Decide the form of a linear layer and check it; the tensor names it accounts for."""
        n, k = slot.shape
        weight = self._require(f"{name}.weight", slot)
        scale = self._store.info(f"{name}.weight_scale")
        form = self._form(weight, n, k)
        if form == "latent" and not self._quantization.online and self.family != "own":
            converted = self._quantization.converts(name)
            raise UnsupportedModelError(
                f"{self.path}: tensor {weight.name!r}: found latent {weight.dtype} "
                f"[{n}, {k}], wanted packed U8 [{n // 4}, {k}]; "
                + (
                    'for latent weights set "linear_class": "autobitlinear" and '
                    '"quantization_mode": "online" in quantization_config'
                    if converted
                    else "modules_to_not_convert leaves this linear layer dense, and dense "
                    "linear layers do not run here"
                )
            )
        if self.family != "own" and not self._quantization.converts(name):
            raise UnsupportedModelError(
                f"{self.path}: tensor {weight.name!r}: modules_to_not_convert leaves this linear "
                "layer dense, and dense linear layers do not run here"
            )
        if form != "latent" and (
            scale is None or scale.dtype not in FLOATS or scale.shape not in ((), (1,))
        ):
            found = f"{scale.dtype} {list(scale.shape)}" if scale else "nothing"
            raise CheckpointError(
                f"{self.path}: tensor {name + '.weight_scale'!r}: found {found}, wanted F32, F16 "
                "or BF16 [1]"
            )
        self._forms[slot.name] = form
        return {weight.name, f"{name}.weight_scale"}

    def _form(self, weight: TensorInfo, n: int, k: int) -> Form:
        if weight.dtype == "U8" and weight.shape == (n // 4, k) and n % 4 == 0:
            return "packed"
        if weight.dtype in FLOATS and weight.shape == (n, k):
            offline = self.family != "own" and not self._quantization.online
            if offline and self._quantization.linear_class == "autobitlinear":
                return "plain" if f"{weight.name}_scale" in self._store.files else "latent"
            return "latent"
        if weight.dtype == "I8" and weight.shape == (n, k):
            return "plain"
        packed = f"packed U8 [{n // 4}, {k}] or " if n % 4 == 0 else ""
        raise CheckpointError(
            f"{self.path}: tensor {weight.name!r}: found {weight.dtype} {list(weight.shape)}, "
            f"wanted {packed}F32, F16 or BF16 [{n}, {k}]"
        )

    def _check_head(self) -> None:
        """A list of unconverted modules without lm_head makes transformers quantise the head."""
        quantization = self._quantization
        if (
            self.family != "own"
            and quantization.linear_class == "autobitlinear"
            and quantization.converts("lm_head")
        ):
            raise UnsupportedModelError(
                f"{self.path}: modules_to_not_convert names no lm_head, which makes the head "
                "ternary; ternary heads do not run here"
            )

    # Tensors.

    def ternary(self, name: str) -> TernarySource:
        n, k = self._slot(name, "linear").shape
        module = hf_name(self.family, name)
        where = f"{self.path}: tensor {module}.weight"
        data, form = self._store.array(f"{module}.weight"), self._forms[name]
        divide = self.config.scale_rule == "divide"
        if form == "latent":
            kind: TernaryKind = FLOATS[
                self._store.files[f"{module}.weight"].tensors[f"{module}.weight"].dtype
            ]
            data = data.view(np.uint16) if kind == "f16" else data
            return TernarySource(name, kind, data, (n, k), 0.0, divide)
        scale = self._scale(module)
        if form == "packed":
            return TernarySource(name, "hf", data, (n, k), scale, divide)
        codes = codes_from_floats(self._floats(f"{module}.weight"), where)
        return TernarySource(name, "codes", codes, (n, k), scale, divide)

    def _scale(self, module: str) -> float:
        value = self._floats(f"{module}.weight_scale").reshape(-1)[0]
        return positive_scale(value, f"{self.path}: tensor {module}.weight_scale")

    def _floats(self, name: str) -> Array:
        """A stored tensor as float32."""
        info = self._store.files[name].tensors[name]
        array = self._store.array(name)
        return as_float32(array, FLOATS[info.dtype]) if info.dtype in FLOATS else array

    def table(self, name: str) -> Table:
        self._slot(name, "table")
        stored = hf_name(self.family, name)
        dtype = FLOATS[self._store.files[stored].tensors[stored].dtype]
        array = self._store.array(stored)
        return Table(array.view(np.uint16) if dtype == "f16" else array, dtype)

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        self._slot(name, "table" if name == "positions" else "vector")
        stored = hf_name(self.family, name)
        values = np.array(self._floats(stored), np.float32)
        require_finite(values, f"{self.path}: tensor {stored}")
        linear = name.removesuffix(".bias")
        if self._forms.get(linear) in ("packed", "plain") and self._scales_bias():
            values *= np.float32(self._scale(hf_name(self.family, linear)))
        return values

    def _scales_bias(self) -> bool:
        """An offline AutoBitLinear adds its bias before scaling: y = (x.W + b) * scale."""
        return self.family != "own" and self.config.scale_rule == "multiply"

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        infos = [self._store.files[n].tensors[n] for n in self._store.files]
        return [(i.name, i.dtype, i.shape) for i in infos]

    def tokenizer_files(self) -> dict[str, Path]:
        found = (n for n in TOKENIZER_FILES if (self.path / n).is_file())
        return {n: resolve_inside(self.path, n) for n in found}

    def close(self) -> None:
        self._store = TensorStore.__new__(TensorStore)
        self._store.files = {}
