"""The weights of layers on a CUDA device, and the intermediates of a block of rows.

csrc/run/layer.h has the order of operations; every kernel gives the CPU's bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bitnet_ext.config import BitNetConfig
from bitnet_ext.gpu.activate import activate
from bitnet_ext.gpu.attend import Precision, StepRoom, attend, attend_step
from bitnet_ext.gpu.device import Device
from bitnet_ext.gpu.kv_append import append
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows
from bitnet_ext.gpu.product import Gate, Product, SplitRoom
from bitnet_ext.gpu.quantise import Activations, NormRows
from bitnet_ext.gpu.rowwise import norm
from bitnet_ext.gpu.ternary import activations, norm_product, split_room
from bitnet_ext.gpu.weight import DeviceTernary
from bitnet_ext.model.layers import Layer, Linear, Norm

__all__ = ["Angles", "DeviceLayer", "DeviceNorm", "Intermediates"]

Angles = tuple[Any, Any] | tuple[None, None]  # cos and sin, float32 [P, head_dim / 2]

# Activations that a product's epilogue applies to gate and up.
_GATES: dict[str, Gate] = {"relu2": "relu2", "silu": "silu"}


@dataclass(frozen=True)
class DeviceNorm:
    """A norm's weights on the device."""

    device: Device
    norm: Norm
    weight: Any
    bias: Any

    @classmethod
    def upload(cls, device: Device, norm: Norm) -> DeviceNorm:
        """Copy the weights to the device."""
        return cls(device, norm, _upload(device, norm.weight), _upload(device, norm.bias))

    @property
    def exists(self) -> bool:
        """Whether it does anything."""
        return self.norm.kind != "none"

    def rows(self, x: Any, out: Any) -> None:
        """The norm of ``x`` in float32; ``out`` may be ``x``."""
        kind = self.norm.kind
        assert kind != "none"
        norm(self.device, x, self.weight, self.bias, self.norm.eps, kind, out)

    def of(self, x: Any) -> NormRows:
        """The norm of ``x``, for a product."""
        return NormRows(x, self.norm.kind, self.weight, self.bias, self.norm.eps)


class DeviceLinear:
    """A ternary linear layer on the device."""

    def __init__(self, device: Device, linear: Linear, gate: Gate = "none") -> None:
        self._device = device
        self._weight = DeviceTernary(device, linear.weight, gated=gate != "none")
        self._host_bias = linear.bias
        self._bias = None if linear.bias is None else self._weight.in_order(linear.bias)
        self._gate: Gate = gate
        self.outputs = linear.weight.shape[0]
        self.norm = DeviceNorm.upload(device, linear.norm)

    def run(
        self,
        x: NormRows,
        room: Activations,
        split: SplitRoom | None,
        out: Any,
        residual: Any = None,
    ) -> None:
        """``out`` = the product with rows ``x``, plus ``residual``; ``room`` is for their int8."""
        p = Product(room, self._weight, out, self._bias, residual, self._gate, split)
        norm_product(self._device, x, p)

    def host(self) -> Linear:
        """The layer on the host again."""
        return Linear(self._weight.packed(), self._host_bias, self.norm.norm)


class Intermediates:
    """What layers write for ``rows`` rows: the residual stream ``hidden`` [rows, E], and the rest.

    Args:
        cache: for one row a sequence, whose attention needs room for parts of the keys.
    """

    hidden: Any
    qkv: Any  # [rows, q | k | v]
    attention: Any  # [rows, q heads * D]
    wide: Any  # [rows, gate | up], or the same as `ffn`
    ffn: Any  # [rows, I]
    normed: Any  # [rows, E] of a norm that a second norm follows
    quantised: dict[int, Activations]  # by width
    step: StepRoom | None
    split: SplitRoom | None  # for the products of so many rows

    def __init__(
        self, device: Device, config: BitNetConfig, rows: int, cache: DeviceCache | None = None
    ) -> None:
        self._device, self._config = device, config
        self._allocate(rows)
        self.step = None if cache is None else StepRoom.empty(cache, config.num_heads)

    def resize(self, rows: int) -> None:
        """For another number of rows; the old arrays go first."""
        if rows != len(self.qkv):
            self.hidden = self.qkv = self.attention = self.wide = self.ffn = self.normed = None
            self.quantised = {}
            self.split = None
            self._allocate(rows)

    def _allocate(self, rows: int) -> None:
        c, inner = self._config, self._config.intermediate_size

        def floats(width: int, count: int = rows) -> Any:
            return self._device.empty((count, width), np.float32)

        self.hidden, self.qkv = floats(c.hidden_size), floats(c.q_size + 2 * c.kv_size)
        self.attention, self.ffn = floats(c.q_size), floats(inner)
        fused = c.gated_ffn and c.hidden_act in _GATES and not c.linear_norm
        self.wide = self.ffn if fused or not c.gated_ffn else floats(2 * inner)
        self.normed = floats(c.hidden_size, rows if c.linear_norm else 0)
        self.quantised = {
            width: activations(self._device, rows, width)
            for width in {c.hidden_size, c.q_size, inner}
        }
        try:
            self.split = split_room(self._device, rows)
        except MemoryError:
            self.split = None


class DeviceLayer:
    """One layer's weights on the device."""

    def __init__(
        self, device: Device, config: BitNetConfig, layer: Layer, precision: Precision
    ) -> None:
        self._device = device
        scale = config.head_dim**-0.5
        self._attend = partial(attend, scale=scale, precision=precision)
        self._attend_step = partial(attend_step, scale=scale, precision=precision)
        self._config = config
        gate: Gate = "none"
        if config.gated_ffn and len(layer.gate_up) == 1:
            gate = _GATES.get(config.hidden_act, "none")
        self._fused = gate != "none"
        self._attn_norm = DeviceNorm.upload(device, layer.attn_norm)
        self._ffn_norm = DeviceNorm.upload(device, layer.ffn_norm)
        self._qkv = [DeviceLinear(device, part) for part in layer.qkv]
        self._o = DeviceLinear(device, layer.o)
        self._gate_up = [DeviceLinear(device, part, gate) for part in layer.gate_up]
        self._down = DeviceLinear(device, layer.down)

    def host(self) -> Layer:
        """The layer on the host again."""
        return Layer(
            self._attn_norm.norm,
            tuple(part.host() for part in self._qkv),
            self._o.host(),
            self._ffn_norm.norm,
            tuple(part.host() for part in self._gate_up),
            self._down.host(),
        )

    def run(
        self, x: Intermediates, cache: DeviceCache, index: int, rows: DeviceRows, angles: Angles
    ) -> None:
        """In place on ``x.hidden``; ``index`` is the layer's in ``cache``."""
        self._group(self._qkv, self._attn_norm, x, x.qkv)
        if rows.starts is None:
            self._attend_step(cache, index, x.qkv, rows, x.attention, *angles, room=x.step)
        else:
            append(cache, index, x.qkv, rows, *angles)
            self._attend(cache, index, x.qkv, rows, x.attention)
        self._onto(self._o, x.attention, x)

        self._group(self._gate_up, self._ffn_norm, x, x.wide)
        if not self._fused:
            c = self._config
            activate(self._device, x.wide, x.ffn, c.hidden_act, c.gated_ffn)
        self._onto(self._down, x.ffn, x)

    def _group(
        self, parts: list[DeviceLinear], norm: DeviceNorm, x: Intermediates, out: Any
    ) -> None:
        """``out[:, part] = part(quantise(part.norm(norm(hidden))))``, the parts side by side."""
        quantised = x.quantised[self._config.hidden_size]
        if len(parts) == 1 and not parts[0].norm.exists:
            parts[0].run(norm.of(x.hidden), quantised, x.split, out)
            return
        source = x.hidden
        if norm.exists:
            norm.rows(x.hidden, x.normed)
            source = x.normed
        column = 0
        for part in parts:
            target = out[:, column : column + part.outputs]
            part.run(part.norm.of(source), quantised, x.split, target)
            column += part.outputs

    def _onto(self, linear: DeviceLinear, source: Any, x: Intermediates) -> None:
        """``hidden += linear(quantise(linear.norm(source)))``"""
        room = x.quantised[source.shape[1]]
        linear.run(linear.norm.of(source), room, x.split, x.hidden, residual=x.hidden)


def _upload(device: Device, values: Any) -> Any:
    return None if values is None else device.to_device(np.ascontiguousarray(values, np.float32))
