"""Block formats of GGUF in NumPy: embeddings to float32, ternary blocks' scales, ternary writers.

Every multiplication is of float32 by float32 in the order of ggml's reference code, so the
values are those that every GGUF reader gives.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.gguf_constants import BLOCKS, I2_S_TAIL
from bitnet_ext.checkpoint.values import positive_scale, require_finite
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["DEQUANTISERS", "dequantise", "encode_i2_s", "encode_tq1_0", "encode_tq2_0", "tq_scale"]

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]
CHUNK_BLOCKS = 1 << 14


def _halves(blocks: U8) -> F32:
    """Two bytes at the end of each row as float16, [blocks, 1]."""
    return np.ascontiguousarray(blocks).view("<f2").astype(np.float32)


def _nibbles(packed: U8) -> U8:
    """Low nibbles of a run, then its high ones: [..., n] -> [..., 2, n]."""
    return np.stack([packed & 15, packed >> 4], axis=-2)


def _q4_0(b: U8) -> F32:
    """d f16 | 16 bytes: element i is the low, i + 16 the high nibble.  x = d * (q - 8)"""
    q = _nibbles(b[:, 2:]).reshape(len(b), 32).astype(np.int8) - np.int8(8)
    return _halves(b[:, :2]) * q.astype(np.float32)


def _q8_0(b: U8) -> F32:
    """d f16 | 32 int8.  x = d * q"""
    return _halves(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _q6_k(b: U8) -> F32:
    """ql[128] | qh[64] | int8 scales[16] | d f16.  x = (d * scale) * (q - 32)

    Of each 128 elements, ql gives low nibbles in runs of 64 bytes, qh two bits in runs of 32.
    """
    low = _nibbles(b[:, :128].reshape(-1, 2, 64)).reshape(-1, 8, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    high = ((b[:, 128:192].reshape(-1, 2, 1, 32) >> shifts) & 3).reshape(-1, 8, 32)
    q = (low | high << 4).astype(np.int8) - np.int8(32)
    scales = _halves(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return (scales[:, :, None] * q.reshape(-1, 16, 16).astype(np.float32)).reshape(-1, 256)


def _q4_k(b: U8) -> F32:
    """d f16 | dmin f16 | scales[12] | qs[128].  x = (d * scale) * q - dmin * minimum

    Eight 6-bit scales and minima: the first four of each whole in bytes 0-3 and 4-7, the last
    four split: low nibbles (scale) and high nibbles (minimum) of bytes 8-11, top bits above.
    """
    head, mid, tail = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    scale = np.concatenate([head & 63, (tail & 15) | (head >> 6) << 4], axis=1)
    minimum = np.concatenate([mid & 63, (tail >> 4) | (mid >> 6) << 4], axis=1)
    d = _halves(b[:, :2]) * scale.astype(np.float32)
    m = _halves(b[:, 2:4]) * minimum.astype(np.float32)
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32).astype(np.float32)
    return (d[:, :, None] * q - m[:, :, None]).reshape(-1, 256)


DEQUANTISERS: dict[str, Callable[[U8], F32]] = {
    "Q4_0": _q4_0,
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q4_K": _q4_k,
}


def dequantise(type_number: int, raw: U8, shape: tuple[int, ...], where: str) -> F32:
    """A quantised matrix as float32, exactly.

    Raises:
        CheckpointError: a block's scale is NaN or infinite.
    """
    name, per_block, block_bytes = BLOCKS[type_number]
    blocks = raw.reshape(-1, block_bytes)
    out = np.empty((len(blocks), per_block), np.float32)
    for start in range(0, len(blocks), CHUNK_BLOCKS):
        part = slice(start, start + CHUNK_BLOCKS)
        with np.errstate(invalid="ignore"):
            out[part] = DEQUANTISERS[name](blocks[part])
        require_finite(out[part], f"{where}: elements from {start * per_block}")
    return out.reshape(shape)


def tq_scale(kind: str, raw: U8, where: str) -> float:
    """The one scale of a TQ1_0 or TQ2_0 tensor; 1 where every weight is zero.

    Raises:
        UnsupportedModelError: blocks of different scales: not a BitNet matrix.
        CheckpointError: a scale that is no positive number, or 0 over weights that are not 0.
    """
    blocks = raw.reshape(-1, 54 if kind == "tq1_0" else 66)
    d = np.ascontiguousarray(blocks[:, -2:]).view("<f2")[:, 0]
    used = d[d != 0]
    if len(used) < len(d):
        empty = blocks[d == 0]
        # TQ1_0 digits: 1,1,1,1,1 encodes to 128; qh's four digits 1,1,1,1,0 to 127.
        zero = (
            ((empty[:, :48] == 128).all() and (empty[:, 48:52] == 127).all())
            if kind == "tq1_0"
            else (empty[:, :64] == 0x55).all()
        )
        if not zero:
            raise CheckpointError(f"{where}: found a block of scale 0 whose weights are not 0")
    if len(used) == 0:
        return 1.0
    first = positive_scale(float(used[0]), where)
    other = used != used[0]
    if other.any():
        value = float(used[int(np.argmax(other))])
        positive_scale(value, where)
        raise UnsupportedModelError(
            f"{where}: found blocks of scale {first} and {value}, wanted one scale: the file was "
            "quantised from a model that is not ternary"
        )
    return first


# Writers.  Codes are int8 [N, K] of -1, 0, 1.


def encode_tq2_0(codes: npt.NDArray[np.int8], scale: float) -> U8:
    """Bytes of a TQ2_0 tensor: element 128j + 32l + m in bits 2l of byte 32j + m."""
    fields = (codes.reshape(-1, 2, 4, 32) + np.int8(1)).astype(np.uint8)
    packed = fields[:, :, 0] | fields[:, :, 1] << 2 | fields[:, :, 2] << 4 | fields[:, :, 3] << 6
    return np.hstack([packed.reshape(-1, 64), _scale_column(codes, scale)]).reshape(-1)


def encode_tq1_0(codes: npt.NDArray[np.int8], scale: float) -> U8:
    """Bytes of a TQ1_0 tensor: five base-3 digits a byte, byte = ceil(256 q / 243)."""
    digits = (codes.reshape(-1, 256) + np.int8(1)).astype(np.uint16)
    five = np.array([81, 27, 9, 3, 1], np.uint16).reshape(1, 5, 1)
    parts = [
        (digits[:, :160].reshape(-1, 5, 32) * five).sum(axis=1),
        (digits[:, 160:240].reshape(-1, 5, 16) * five).sum(axis=1),
        (digits[:, 240:].reshape(-1, 4, 4) * five[:, :4]).sum(axis=1),
    ]
    packed = ((np.hstack(parts) * 256 + 242) // 243).astype(np.uint8)
    return np.hstack([packed, _scale_column(codes, scale)]).reshape(-1)


def encode_i2_s(codes: npt.NDArray[np.int8], scale: float) -> U8:
    """Bytes of a canonical I2_S tensor: 128 weights in 32 bytes, then the tail."""
    fields = (codes.reshape(-1, 4, 32) + np.int8(1)).astype(np.uint8)
    packed = fields[:, 0] << 6 | fields[:, 1] << 4 | fields[:, 2] << 2 | fields[:, 3]
    tail = np.zeros(I2_S_TAIL, np.uint8)
    tail[:4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def _scale_column(codes: npt.NDArray[np.int8], scale: float) -> U8:
    """f16 scale per block as two bytes; 0 where a block has no weight, as ggml writes it."""
    used = codes.reshape(-1, 256).any(axis=1)
    return np.where(used, scale, 0).astype("<f2").view(np.uint8).reshape(-1, 2)
