"""What a call will need, computed from the configuration alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bitnet_ext import _core
from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import DeviceUnavailableError, InvalidShapeError
from bitnet_ext.memory.estimate_device import device_parts, device_screen
from bitnet_ext.memory.workspace import FULL_BLOCK_ROWS, PREFILL_BLOCK_ROWS, workspace_bytes

__all__ = ["MemoryEstimate", "estimate_memory", "kv_bytes_per_token", "screen_bytes"]

_PAGE_TOKENS = 64

# Tables from this size on are worth a screen: a smaller one is read from the caches.
_SCREEN_ELEMENTS = 1 << 23
_DEVICE_SCREEN_ELEMENTS = 1 << 25  # fewer take less time than the steps of a screen
_SCREEN_ROWS = 8  # kScreenRows in csrc/screen/select.h


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes by purpose; ``weights`` includes the memory-mapped embeddings, all of them touched."""

    weights: int
    kv_cache: int
    activations: int
    output: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.kv_cache + self.activations + self.output


def estimate_memory(
    config: BitNetConfig,
    batch_size: int,
    seq_len: int,
    mode: Literal["full", "prefill", "decode", "generate"] = "full",
    kv_dtype: Literal["f32", "f16", "int8"] = "f32",
    device: str = "cpu",
) -> MemoryEstimate:
    """Bytes that a call on ``batch_size`` sequences of ``seq_len`` tokens needs at its peak.

    "full" is ``forward_full`` with every position's logits: K and V of one layer at a time.
    "prefill" and "decode" hold the cache of every layer and one row of logits a sequence;
    "generate" is "prefill" followed by ``decode_topk``, which makes an int8 copy of a large
    vocabulary table (among the weights).

    On "cuda" a step's own arrays and the sampler's count too; no device is asked for.

    Raises:
        InvalidShapeError: a size that is not positive, an unknown mode or kv_dtype.
        DeviceUnavailableError: a device other than "cpu" and "cuda".
    """
    if device not in ("cpu", "cuda"):
        raise DeviceUnavailableError(f"device: found {device!r}, wanted 'cpu' or 'cuda'")
    if batch_size <= 0 or seq_len <= 0:
        raise InvalidShapeError(
            f"batch_size, seq_len: found {batch_size}, {seq_len}, wanted positive integers"
        )
    if mode not in ("full", "prefill", "decode", "generate"):
        raise InvalidShapeError(
            f"mode: found {mode!r}, wanted 'full', 'prefill', 'decode' or 'generate'"
        )
    token = kv_bytes_per_token(config, kv_dtype)
    screen = 0
    if mode == "generate":
        screen = screen_bytes(config.vocab_size, config.hidden_size, device)
    if device == "cuda":
        parts = device_parts(config, batch_size, seq_len, mode, kv_dtype, screen)
        return MemoryEstimate(*parts)
    rows = batch_size if mode == "decode" else batch_size * seq_len
    block = min(rows, FULL_BLOCK_ROWS if mode == "full" else PREFILL_BLOCK_ROWS)
    layers = 1 if mode == "full" else config.num_layers
    pages = -(-seq_len // _PAGE_TOKENS)
    tokens = batch_size * pages * _PAGE_TOKENS
    hidden = 4 * rows * config.hidden_size if mode == "full" else 0
    bounds = 15 * config.vocab_size * min(batch_size, _SCREEN_ROWS) if screen else 0
    return MemoryEstimate(
        weights=_weight_bytes(config) + screen,
        kv_cache=tokens * layers * token,
        activations=hidden + bounds + workspace_bytes(config, block),
        output=4 * config.vocab_size * (rows if mode == "full" else batch_size),
    )


def kv_bytes_per_token(config: BitNetConfig, kv_dtype: str) -> int:
    """Bytes of K and V of one token in one layer."""
    sizes = {"f32": 4, "f16": 2, "int8": 1}
    if kv_dtype not in sizes:
        raise InvalidShapeError(f"kv_dtype: found {kv_dtype!r}, wanted one of {sorted(sizes)}")
    scales = 2 * 4 * config.num_kv_heads if kv_dtype == "int8" else 0
    return 2 * config.kv_size * sizes[kv_dtype] + scales


def screen_bytes(vocab_size: int, width: int, device: str = "cpu") -> int:
    """Bytes of the screen of a vocabulary table; 0 where the table is too small to gain by one."""
    on_host = device == "cpu"
    if vocab_size * width < (_SCREEN_ELEMENTS if on_host else _DEVICE_SCREEN_ELEMENTS):
        return 0
    held = _core.VocabScreen.bytes if on_host else device_screen
    return held(vocab_size, width)


def _weight_bytes(config: BitNetConfig) -> int:
    packed = _core.PackedTernary.stored_bytes
    c = config
    ffn_inputs = 2 if c.gated_ffn else 1
    layer = (
        packed(c.q_size + 2 * c.kv_size, c.hidden_size)
        + packed(c.hidden_size, c.q_size)
        + packed(ffn_inputs * c.intermediate_size, c.hidden_size)
        + packed(c.hidden_size, c.intermediate_size)
        + 4 * (3 * c.hidden_size + c.intermediate_size)
    )
    table = 2 * c.vocab_size * c.hidden_size
    positions = 4 * c.max_position_embeddings * c.hidden_size if c.position == "learned" else 0
    return c.num_layers * layer + table * (1 if c.tie_word_embeddings else 2) + positions
