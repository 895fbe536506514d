"""A loaded model taken apart again: its tensors by canonical name, for the writers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.source import Checkpoint, Table
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import CheckpointError

if TYPE_CHECKING:
    from bitnet_ext import _core
    from bitnet_ext.model.layers import Linear, Norm
    from bitnet_ext.model.load import Weights

__all__ = ["Matrix", "Parts", "take_apart"]

Float32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Matrix:
    """Rows ``start`` to ``stop`` of a packed matrix, which may hold several layers' rows."""

    name: str
    packed: _core.PackedTernary
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, int]:
        """[N, K] of these rows."""
        return self.stop - self.start, self.packed.shape[1]

    @property
    def scale(self) -> float:
        """The one scale of these rows.

        Raises:
            CheckpointError: the rows have scales of their own.
        """
        scales = np.broadcast_to(np.float32(self.packed.scale), (self.packed.shape[0],))
        rows = scales[self.start : self.stop]
        if (rows != rows[0]).any():
            raise CheckpointError(
                f"{self.name}: found a scale for each row, wanted one: no file format holds them"
            )
        return float(rows[0])

    def codes(self) -> npt.NDArray[np.int8]:
        """The weights as -1, 0 and 1, int8 [N, K]."""
        codes: npt.NDArray[np.int8] = self.packed.unpack()[self.start : self.stop]
        return codes


@dataclass(frozen=True)
class Parts:
    """Tensors by canonical name; ``divide``: how every scale acts."""

    matrices: dict[str, Matrix]
    vectors: dict[str, Float32]
    tables: dict[str, Table]
    divide: bool


def take_apart(config: BitNetConfig, weights: Weights, checkpoint: Checkpoint | None) -> Parts:
    """Split fused matrices and biases; nothing is copied or unpacked.

    ``checkpoint``, where the model came from, gives the head that an int8 one was made of.

    Raises:
        CheckpointError: an int8 head without its original, or layers of both scale rules.
    """
    taker = _Taker(config)
    for i, layer in enumerate(weights.layers):
        prefix = f"layers.{i}."
        taker.norm(prefix + "attn_norm", layer.attn_norm)
        taker.group(prefix, ("qkv",) if config.fused_qkv else ("q", "k", "v"), layer.qkv)
        taker.linear(prefix, "o", layer.o, "attn_sub_norm")
        if config.ffn_norm:
            taker.norm(prefix + "ffn_norm", layer.ffn_norm)
        taker.group(prefix, ("gate", "up") if config.gated_ffn else ("up",), layer.gate_up)
        taker.linear(prefix, "down", layer.down, "ffn_sub_norm")
    taker.norm("final_norm", weights.final_norm)
    if config.head_bias:
        taker.vectors["head.bias"] = cast(Float32, weights.head_bias)
    tables = {"embed": _exact("embed", weights.embedding, checkpoint)}
    if not config.tie_word_embeddings:
        tables["head"] = _exact("head", weights.head, checkpoint)
    if config.position == "learned":
        tables["positions"] = Table(cast(Float32, weights.positions), "f32")
    rules = {matrix.packed.divide for matrix in taker.matrices.values()}
    if len(rules) != 1:
        raise CheckpointError("the model: found layers that multiply and layers that divide")
    return Parts(taker.matrices, taker.vectors, tables, rules.pop())


def _exact(name: str, table: Any, checkpoint: Checkpoint | None) -> Table:
    """A table as stored, also where the model holds an int8 copy."""
    if table.dtype != "int8":
        return Table(table.data, table.dtype)
    if checkpoint is None:
        raise CheckpointError(f"{name}: found an int8 copy alone, wanted the exact table")
    return checkpoint.table(name)


class _Taker:
    """Collects tensors by name."""

    def __init__(self, config: BitNetConfig) -> None:
        self.config = config
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, Float32] = {}

    def norm(self, name: str, norm: Norm) -> None:
        weight = cast(Float32, norm.weight)
        self.vectors[f"{name}.weight"] = weight
        if norm.kind == "layer":
            bias = norm.bias
            self.vectors[f"{name}.bias"] = np.zeros_like(weight) if bias is None else bias

    def linear(self, prefix: str, name: str, linear: Linear, sub_norm: str = "") -> None:
        """A layer of its own, and the norm of its input: inside it, or the sub-norm before it."""
        self._rows(prefix + name, linear, 0, linear.weight.shape[0])
        if self.config.linear_norm:
            self.vectors[f"{prefix}{name}.norm.weight"] = cast(Float32, linear.norm.weight)
        elif linear.norm.kind != "none":
            self.norm(prefix + sub_norm, linear.norm)

    def group(self, prefix: str, names: tuple[str, ...], parts: tuple[Linear, ...]) -> None:
        if len(parts) == len(names):
            for name, part in zip(names, parts, strict=True):
                self.linear(prefix, name, part)
            return
        start = 0
        for name in names:
            stop = start + self._height(name)
            self._rows(prefix + name, parts[0], start, stop)
            start = stop

    def _height(self, name: str) -> int:
        config = self.config
        if name in ("gate", "up"):
            return config.intermediate_size
        return config.q_size if name == "q" else config.kv_size

    def _rows(self, name: str, linear: Linear, start: int, stop: int) -> None:
        self.matrices[name] = Matrix(name, linear.weight, start, stop)
        part = name.rpartition(".")[2]
        ffn = part in ("gate", "up", "down")
        if self.config.ffn_bias if ffn else self.config.attention_bias:
            bias = linear.bias
            size = stop - start
            rows = np.zeros(size, np.float32) if bias is None else bias[start:stop]
            self.vectors[f"{name}.bias"] = rows
