"""What calls need on a CUDA device, from the layouts of its arrays."""

from __future__ import annotations

from bitnet_ext.config import BitNetConfig

__all__ = ["DEVICE_BLOCK_ROWS", "device_parts", "device_screen"]

DEVICE_BLOCK_ROWS = 2048  # of a prefill or a full forward: enough for the matrix units

_PAGE_TOKENS = 64
# Blocks of products share tiles: int32 sums of two tiles each, on an H200's 132 multiprocessors.
_SHARED_SUMS = [
    (64, 132 * 2 * 256 * 128),
    (32, 132 * 3 * 2 * 128 * 64),
    (16, 132 * 3 * 2 * 128 * 32),
]
_PARTS = [(512, 17), (256, 5)]  # keys, and numbers beside the values, of attention's parts
_SIZES = {"f32": 4, "f16": 2, "int8": 1}


def device_parts(
    config: BitNetConfig, batch_size: int, seq_len: int, mode: str, kv_dtype: str, screen: int
) -> tuple[int, int, int, int]:
    """Bytes of weights, keys and values, intermediates and logits; modes of estimate_memory.

    Args:
        screen: bytes of the vocabulary's; 0: there is none.
    """
    c = config
    rows = batch_size if mode == "decode" else batch_size * seq_len
    layers = 1 if mode == "full" else c.num_layers
    tokens = batch_size * _up(seq_len, _PAGE_TOKENS)
    size = _SIZES[kv_dtype]
    vector = _up(c.head_dim * size, 16) + (4 if kv_dtype == "int8" else 0)
    work = _intermediates(c, min(rows, DEVICE_BLOCK_ROWS)) + 16 * rows
    hidden = 4 * c.hidden_size * (rows if mode == "full" else batch_size)
    if mode in ("decode", "generate"):
        work += _step(c, batch_size, seq_len)
    if mode == "generate":
        work += batch_size * (9 * c.vocab_size + 8 * 2048)
    if screen:
        work += batch_size * _screened(c.vocab_size, c.hidden_size)
    return (
        _weights(c, seq_len) + screen,
        2 * layers * tokens * c.num_kv_heads * vector,
        work + hidden,
        4 * c.vocab_size * (rows if mode == "full" else batch_size),
    )


def device_screen(vocab_size: int, width: int) -> int:
    """Bytes of a vocabulary's screen: two planes of 4 bits, the first in whole pairs of tiles of
    16 rows, and three numbers a row."""
    row = _up(width, 64) // 2
    return _up(vocab_size, 32) * row + vocab_size * (row + 12)


def _screened(vocab_size: int, width: int) -> int:
    """What a row takes on its way through the screen: lists, groups' bounds, its pieces."""
    return 5 * vocab_size + 8 * (vocab_size // 64) + 2 * _up(width, 64) + 65


def _up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def _intermediates(c: BitNetConfig, rows: int) -> int:
    """A block of rows: the residual stream, q | k | v, attention, the FFN, and their int8."""
    fused = c.gated_ffn and c.hidden_act in ("relu2", "silu") and not c.linear_norm
    wide = 2 * c.intermediate_size if c.gated_ffn and not fused else 0
    normed = c.hidden_size if c.linear_norm else 0
    floats = c.hidden_size + 2 * c.q_size + 2 * c.kv_size + c.intermediate_size + wide + normed
    widths = {c.hidden_size, c.q_size, c.intermediate_size}
    shared = next((4 * sums for above, sums in _SHARED_SUMS if rows > above), 0)
    return rows * (4 * floats + sum(_up(width, 128) + 8 for width in widths)) + shared


def _step(c: BitNetConfig, batch_size: int, seq_len: int) -> int:
    """What a decode step keeps: intermediates, and attention's partial results."""
    each = max(-(-seq_len // keys) * (more + c.head_dim) for keys, more in _PARTS)
    states = 4 * batch_size * (c.num_heads * each + c.num_kv_heads)
    return _intermediates(c, batch_size) + states + 4 * batch_size * c.hidden_size


def _weights(c: BitNetConfig, seq_len: int) -> int:
    def packed(n: int, k: int) -> int:  # 2 bits a weight in panels of 64 by 128, a scale a row
        return _up(n, 64) * (_up(k, 128) // 4 + 4)

    ffn_inputs = 2 if c.gated_ffn else 1
    layer = (
        packed(c.q_size + 2 * c.kv_size, c.hidden_size)
        + packed(c.hidden_size, c.q_size)
        + packed(ffn_inputs * c.intermediate_size, c.hidden_size)
        + packed(c.hidden_size, c.intermediate_size)
        + 4 * (3 * c.hidden_size + c.intermediate_size)
    )
    table = 2 * c.vocab_size * _up(c.hidden_size, 16) * (1 if c.tie_word_embeddings else 2)
    if c.position == "learned":
        angles = 4 * c.max_position_embeddings * c.hidden_size
    else:
        held = min(max(256, 1 << (seq_len - 1).bit_length()), c.max_position_embeddings)
        angles = 4 * held * c.head_dim
    return c.num_layers * layer + table + angles
