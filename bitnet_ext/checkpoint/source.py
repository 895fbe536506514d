"""What a checkpoint hands to the model: ternary matrices as stored, tables, small dense tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.families import Slot
from bitnet_ext.checkpoint.files import release_pages
from bitnet_ext.config import BitNetConfig

__all__ = ["Array", "Checkpoint", "FloatName", "Table", "TernaryKind", "TernarySource"]

Array = npt.NDArray[Any]
FloatName = Literal["f32", "f16", "bf16"]
TernaryKind = Literal[
    "codes", "hf", "tq1_0", "tq2_0", "i2_s", "i2_s_arm", "i2_s_rows4", "f32", "f16", "bf16"
]


@dataclass(frozen=True)
class TernarySource:
    """One ternary matrix [N, K] as its file stores it.

    ``data`` by ``kind``: "codes" int8 [N, K] of -1, 0, 1; "hf" uint8 [N/4, K]; "tq1_0", "tq2_0"
    and "i2_s*" uint8 [bytes] (without I2_S's tail); "f32" float32 [N, K], "f16" and "bf16" their
    bits as uint16 [N, K], latent weights to be quantised by their absolute mean (``scale`` is 0).
    Otherwise ``scale`` is a positive float32 value: y = acc / s * scale, or acc / (scale * s)
    when ``divide``.  ``row_order`` (int32 [N]): row n of the matrix is row ``row_order[n]`` of
    ``data``.  Field values of 3 are not looked for here: packing finds them.
    """

    name: str
    kind: TernaryKind
    data: Array
    shape: tuple[int, int]
    scale: float
    divide: bool = False
    row_order: Array | None = None

    def release(self) -> None:
        """Let go of the file's pages after packing; ``data`` stays readable."""
        release_pages(self.data)


@dataclass(frozen=True)
class Table:
    """A matrix [V, E] read by rows: float32, or the bits of f16 / bf16 as uint16."""

    data: Array
    dtype: FloatName


class Checkpoint(ABC):
    """An opened checkpoint: every promised tensor is there with the right shape and dtype.

    Linear layers, tables and vectors go by canonical names: "embed", "head", "positions",
    "final_norm.weight", "layers.0.q", "layers.0.q.bias", ...  ``path`` is the directory or file.
    """

    path: Path
    config: BitNetConfig
    generation_config: dict[str, Any]
    gguf_metadata: dict[str, Any]
    format: str

    _slots: dict[str, Slot]  # what the checkpoint holds, by canonical name

    def has(self, name: str) -> bool:
        """Whether the checkpoint holds the tensor of this canonical name."""
        return name in self._slots

    def _slot(self, name: str, kind: str) -> Slot:
        slot = self._slots.get(name)
        if slot is None or slot.kind != kind:
            raise KeyError(f"{self.path}: no {kind} named {name!r}")
        return slot

    @abstractmethod
    def ternary(self, name: str) -> TernarySource:
        """A linear layer's weights; CheckpointError for a bad scale or unusable values."""

    @abstractmethod
    def table(self, name: str) -> Table:
        """ "embed" or "head", mapped from the file where its type allows."""

    @abstractmethod
    def dense(self, name: str) -> npt.NDArray[np.float32]:
        """A vector, or "positions", as float32 of its own.

        Raises:
            CheckpointError: a value is not finite.
        """

    @abstractmethod
    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(name in the file, stored type, shape) of every tensor, in file order."""

    @abstractmethod
    def tokenizer_files(self) -> dict[str, Path]:
        """Files beside the weights, by name: tokenizer.json, tokenizer_config.json, ..."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the mapped files; arrays handed out stay valid."""
