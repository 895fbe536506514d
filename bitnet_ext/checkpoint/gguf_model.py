"""GGUF files of ternary models: architecture, names and scales to the canonical form."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.families import Slot, gguf_name, slots
from bitnet_ext.checkpoint.files import release_pages
from bitnet_ext.checkpoint.gguf import GgufFile, GgufTensor, unsupported_type
from bitnet_ext.checkpoint.gguf_config import gguf_config
from bitnet_ext.checkpoint.gguf_constants import I2_S_TAIL
from bitnet_ext.checkpoint.gguf_quants import DEQUANTISERS, dequantise, tq_scale
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
    positive_scale,
    require_finite,
    ternary_levels,
)
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["GgufCheckpoint"]

FLOATS: dict[str, FloatName] = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
I2S_KINDS: dict[str, tuple[TernaryKind, int]] = {  # layout -> kind, what N*K or N must divide
    "canonical": ("i2_s", 128),
    "arm": ("i2_s_arm", 64),
    "rows4": ("i2_s_rows4", 4),
}
ZERO_FIELDS = 0x55  # four 2-bit fields of 1: four weights of 0


class GgufCheckpoint(Checkpoint):
    """A GGUF file; architecture, shapes and types are checked at once, scales when asked for.

    Raises:
        UnsupportedModelError: an architecture, tensor type or rope that does not run here.
        CheckpointError: the file contradicts itself or the format.
    """

    generation_config: dict[str, Any]

    def __init__(
        self, path: Path, i2s_layout: Literal["canonical", "arm", "rows4"] = "canonical"
    ) -> None:
        self.path = path
        self._layout = i2s_layout
        file = self._file = GgufFile(path)
        self.gguf_metadata = file.metadata
        self.generation_config = {}
        self.architecture, self.config = gguf_config(file)
        self._slots = {}
        self._check()
        types = {self._tensor(s.name).type_name for s in self._slots.values() if s.kind == "linear"}
        self.format = f"GGUF, {self.architecture}, {'/'.join(sorted(types))}"

    def _check(self) -> None:
        expected = {"rope_freqs.weight"}
        if self.config.tie_word_embeddings:
            expected.add("output.weight")  # arch bitnet ignores it
        for slot in slots(self.config):
            self._slots[slot.name] = slot
            name = self._stored(slot)
            if slot.name.endswith(".bias") and name not in self._file.tensors:
                continue  # a layer may lack a bias that another has: zeros
            tensor = self._file.tensors.get(name)
            if tensor is None:
                raise CheckpointError(
                    f"{self.path}: tensor {name!r} is missing, wanted shape {list(slot.shape)}"
                )
            self._check_tensor(slot, tensor)
            expected.add(name)
            expected.add(name.removesuffix(".weight") + ".scale")
        for name in self._file.tensors:
            if name not in expected:
                raise UnsupportedModelError(
                    f"{self.path}: tensor {name[:200]!r} is not part of a {self.architecture} "
                    "model that runs here; leaving it out would compute another model"
                )

    def _stored(self, slot: Slot) -> str:
        name = gguf_name(slot.name)
        return f"{name}.weight" if slot.kind == "linear" else name

    def _check_tensor(self, slot: Slot, tensor: GgufTensor) -> None:
        if tensor.shape != slot.shape:
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r}: found shape {list(tensor.shape)}, wanted "
                f"{list(slot.shape)}"
            )
        name = tensor.type_name
        if slot.kind == "linear" and name == "I2_S":
            n, k = slot.shape
            kind, multiple = I2S_KINDS[self._layout]
            extent, what = (n, "rows") if self._layout == "rows4" else (k, "columns")
            if extent % multiple:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r}: found {extent} {what}, wanted a "
                    f"multiple of {multiple} for the layout {kind}"
                )
            return
        usable = set(FLOATS)
        if slot.kind == "linear":
            usable |= {"TQ1_0", "TQ2_0"}
        elif slot.kind == "table":
            usable |= set(DEQUANTISERS)
        if name not in usable:
            raise UnsupportedModelError(unsupported_type(str(self.path), tensor.name, tensor.type))

    def _tensor(self, name: str) -> GgufTensor:
        return self._file.tensors[self._stored(self._slots[name])]

    def ternary(self, name: str) -> TernarySource:
        n, k = self._slot(name, "linear").shape
        tensor = self._tensor(name)
        where = f"{self.path}: tensor {tensor.name}"
        raw = self._file.raw(tensor.name)
        order = self._row_order(name)
        extra = self._extra_scale(tensor.name)
        if tensor.type_name in FLOATS:
            return self._latent(name, tensor, order, extra)
        if tensor.type_name == "I2_S":
            kind = I2S_KINDS[self._layout][0]
            codes, tail = raw[:-I2_S_TAIL], raw[-I2_S_TAIL:]
            value = float(tail[:4].copy().view("<f4")[0])
            if value == 0 and bool((codes == ZERO_FIELDS).all()):
                value = 1.0  # an all-zero matrix has no scale of its own
            scale = positive_scale(value, where)
        else:
            kind = "tq1_0" if tensor.type_name == "TQ1_0" else "tq2_0"
            codes, scale = raw, tq_scale(kind, raw, where)
        scale = positive_scale(float(np.float32(scale) * np.float32(extra)), where)
        return TernarySource(name, kind, codes, (n, k), scale, row_order=order)

    def _latent(
        self, name: str, tensor: GgufTensor, order: Array | None, extra: float
    ) -> TernarySource:
        """Float weights: already -s, 0, s (converters write them so), or latent ones.

        Quantising -s, 0, s by the absolute mean again would shrink the scale by the share of
        weights that are not 0, so such matrices keep s.
        """
        n, k = cast(tuple[int, int], tensor.shape)
        dtype = FLOATS[tensor.type_name]
        values = self._floats(tensor)
        levels = ternary_levels(values, dtype)
        where = f"{self.path}: tensor {tensor.name}"
        if levels is not None:
            release_pages(values)
            scale = positive_scale(float(np.float32(levels[1]) * np.float32(extra)), where)
            return TernarySource(name, "codes", levels[0], (n, k), scale, row_order=order)
        if self.architecture == "llama":
            raise UnsupportedModelError(
                f"{where}: found {tensor.type_name} values of more than one magnitude: a dense "
                "Llama model, not a ternary one"
            )
        if extra != 1:
            raise UnsupportedModelError(f"{where}: latent weights with a .scale tensor are unknown")
        return TernarySource(name, dtype, values, (n, k), 0.0, row_order=order)

    def _floats(self, tensor: GgufTensor) -> Array:
        """A float tensor in its shape: float32, or uint16 bits; copied only if misaligned."""
        raw = self._file.raw(tensor.name)
        dtype = np.dtype("<f4" if tensor.type_name == "F32" else "<u2")
        if raw.ctypes.data % dtype.alignment:
            raw = raw.copy()
        return raw.view(dtype).reshape(tensor.shape)

    def _extra_scale(self, weight: str) -> float:
        """The optional one-element tensor <name>.scale beside <name>.weight."""
        name = weight.removesuffix(".weight") + ".scale"
        tensor = self._file.tensors.get(name)
        if tensor is None:
            return 1.0
        if tensor.type_name != "F32" or tensor.shape not in ((), (1,)):
            raise CheckpointError(
                f"{self.path}: tensor {name!r}: found {tensor.type_name} {list(tensor.shape)}, "
                "wanted F32 [1]"
            )
        value = float(self._file.raw(name).copy().view("<f4")[0])
        return positive_scale(value, f"{self.path}: tensor {name}")

    def _row_order(self, name: str) -> npt.NDArray[np.int32] | None:
        """Arch llama interleaves the two halves of each Q and K head for its rotary order.

        Row (h, half, j) of the matrix stands at (h, j, half) of the file.
        """
        part = name.removesuffix(".bias").rsplit(".", 1)[1]
        if self.architecture != "llama" or part not in ("q", "k"):
            return None
        heads = self.config.num_heads if part == "q" else self.config.num_kv_heads
        rows = np.arange(heads * self.config.head_dim, dtype=np.int32)
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1).copy()

    def table(self, name: str) -> Table:
        self._slot(name, "table")
        tensor = self._tensor(name)
        if tensor.type_name in FLOATS:
            return Table(self._floats(tensor), FLOATS[tensor.type_name])
        raw = self._file.raw(tensor.name)
        where = f"{self.path}: tensor {tensor.name}"
        return Table(dequantise(tensor.type, raw, tensor.shape, where), "f32")

    def dense(self, name: str) -> npt.NDArray[np.float32]:
        slot = self._slot(name, "vector")
        stored = self._stored(slot)
        if stored not in self._file.tensors:
            return np.zeros(slot.shape, np.float32)
        tensor = self._tensor(name)
        values = np.array(as_float32(self._floats(tensor), FLOATS[tensor.type_name]), np.float32)
        require_finite(values, f"{self.path}: tensor {stored}")
        order = self._row_order(name) if name.endswith(".bias") else None
        return values if order is None else values[order]

    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        return [(t.name, t.type_name, t.shape) for t in self._file.tensors.values()]

    def tokenizer_files(self) -> dict[str, Path]:
        return {}

    def close(self) -> None:
        self._file.bytes = np.empty(0, np.uint8)
        self._file.tensors = {}
