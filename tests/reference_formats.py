"""NumPy definitions of every stored form of a ternary matrix: the readable truth for the packers.

``encode_<kind>`` writes codes of -1, 0, 1 as a file holds them, ``decode`` reads them back.  The
kinds are those of :class:`bitnet_ext.checkpoint.TernarySource`.
"""

from __future__ import annotations

import numpy as np

KINDS = ("codes", "hf", "tq1_0", "tq2_0", "i2_s", "i2_s_arm", "i2_s_rows4", "f32", "f16", "bf16")
I2S_TAIL = 32  # bytes after the codes: float32 scale, 28 undefined


def to_bf16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bits of bfloat16, to nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 bits of bfloat16 -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def absmean(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Ternary codes and multiplying scale of a latent float matrix.

    s = 1 / max(mean|W|, 1e-5);  q = clamp(rint(W * s), -1, 1);  W ~ q * (1/s)
    """
    w = weight.astype(np.float32)
    mean = np.float32(np.abs(w).mean(dtype=np.float64))
    s = np.float32(1) / max(mean, np.float32(1e-5))
    return np.clip(np.rint(w * s), -1, 1).astype(np.int8), np.float32(1) / s


def encode_hf(codes: np.ndarray) -> np.ndarray:
    """[N, K] -> uint8 [N/4, K]: quarter i of the rows stands at bits 2i, 2i+1."""
    n, k = codes.shape
    quarters = (codes + 1).astype(np.uint8).reshape(4, n // 4, k)
    return quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6


def decode_hf(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """uint8 [N/4, K] -> field values 0..3, [N, K]."""
    packed = data.reshape(n // 4, k)
    return np.concatenate([(packed >> 2 * i) & 3 for i in range(4)])


def _encode_groups(codes: np.ndarray, group: int) -> np.ndarray:
    """Flat index 4*group*b + group*g + p -> byte group*b + p, bits 6-2g."""
    q = (codes.reshape(-1) + 1).astype(np.uint8).reshape(-1, 4, group)
    return (q[:, 0] << 6 | q[:, 1] << 4 | q[:, 2] << 2 | q[:, 3]).reshape(-1)


def _decode_groups(data: np.ndarray, n: int, k: int, group: int) -> np.ndarray:
    blocks = data[: n * k // 4].reshape(-1, 1, group)
    shifts = np.array([6, 4, 2, 0], np.uint8).reshape(1, 4, 1)
    return ((blocks >> shifts) & 3).reshape(n, k)


def encode_i2_s(codes: np.ndarray) -> np.ndarray:
    """Canonical I2_S: groups of 128 weights in 32 bytes."""
    return _encode_groups(codes, 32)


def encode_i2_s_arm(codes: np.ndarray) -> np.ndarray:
    """I2_S of ARM builds: groups of 64 weights in 16 bytes."""
    return _encode_groups(codes, 16)


def encode_i2_s_rows4(codes: np.ndarray) -> np.ndarray:
    """I2_S of some x86 builds: byte r*K + c holds rows 4r..4r+3 of column c at bits 6, 4, 2, 0."""
    n, k = codes.shape
    q = (codes + 1).astype(np.uint8).reshape(n // 4, 4, k)
    return (q[:, 0] << 6 | q[:, 1] << 4 | q[:, 2] << 2 | q[:, 3]).reshape(-1)


def decode_i2_s_rows4(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """Inverse of encode_i2_s_rows4, as field values 0..3."""
    bytes_ = data[: n * k // 4].reshape(n // 4, 1, k)
    shifts = np.array([6, 4, 2, 0], np.uint8).reshape(1, 4, 1)
    return ((bytes_ >> shifts) & 3).reshape(n, k)


def with_i2s_tail(packed: np.ndarray, scale: float) -> np.ndarray:
    """Append the 32-byte tail: the float32 scale first, then bytes nobody defines."""
    tail = np.full(I2S_TAIL, 0xA5, np.uint8)
    tail[:4] = np.frombuffer(np.float32(scale).tobytes(), np.uint8)
    return np.concatenate([packed, tail])


def encode_tq2_0(codes: np.ndarray, scale: float) -> np.ndarray:
    """66 bytes per 256 weights: element 128j + 32l + m at byte 32j + m, bits 2l; then f16 d."""
    blocks = codes.reshape(-1, 256)
    q = (blocks + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    qs = q[:, :, 0] | q[:, :, 1] << 2 | q[:, :, 2] << 4 | q[:, :, 3] << 6
    return np.concatenate([qs.reshape(-1, 64), _block_scales(blocks, scale)], axis=1).reshape(-1)


def decode_tq2_0(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """Field values 0..3, [N, K]."""
    qs = data.reshape(-1, 66)[:, :64].reshape(-1, 2, 1, 32)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    return ((qs >> shifts) & 3).reshape(n, k)


def encode_tq1_0(codes: np.ndarray, scale: float) -> np.ndarray:
    """54 bytes per 256 weights: qs[48], qh[4] in base 3, then f16 d."""
    blocks = codes.reshape(-1, 256)
    q = (blocks + 1).astype(np.uint16)

    def digits(part: np.ndarray, trits: int) -> np.ndarray:
        value = np.zeros(part[:, 0].shape, np.uint16)
        for i in range(5):
            value = value * 3 + (part[:, i] if i < trits else 0)
        return ((value * 256 + 242) // 243).astype(np.uint8)

    first = digits(q[:, :160].reshape(-1, 5, 32), 5)
    second = digits(q[:, 160:240].reshape(-1, 5, 16), 5)
    last = digits(q[:, 240:].reshape(-1, 4, 4), 4)
    return np.concatenate([first, second, last, _block_scales(blocks, scale)], axis=1).reshape(-1)


def decode_tq1_0(data: np.ndarray, n: int, k: int) -> np.ndarray:
    """Field values 0..2, [N, K]: trit(b, i) = (((b * 3^i) & 255) * 3) >> 8."""
    blocks = data.reshape(-1, 54)

    def trits(part: np.ndarray, count: int) -> np.ndarray:
        powers = np.array([1, 3, 9, 27, 81], np.uint16)[:count].reshape(1, count, 1)
        low = (part[:, None, :].astype(np.uint16) * powers) & 255
        return ((low * 3) >> 8).astype(np.uint8).reshape(len(part), -1)

    parts = [trits(blocks[:, :32], 5), trits(blocks[:, 32:48], 5), trits(blocks[:, 48:52], 4)]
    return np.concatenate(parts, axis=1).reshape(n, k)


def _block_scales(blocks: np.ndarray, scale: float) -> np.ndarray:
    """f16 d per block as 2 bytes: 0 where the block is all zero, as gguf's quantiser writes it."""
    d = np.where(np.any(blocks, axis=1), np.float16(scale), np.float16(0)).astype(np.float16)
    return d.view(np.uint8).reshape(-1, 2)


def encode(kind: str, codes: np.ndarray, scale: float = 1.0) -> np.ndarray:
    """Bytes of a packed kind as TernarySource.data holds them (I2_S without its tail)."""
    if kind == "codes":
        return codes
    if kind in ("tq1_0", "tq2_0"):
        return {"tq1_0": encode_tq1_0, "tq2_0": encode_tq2_0}[kind](codes, scale)
    encoders = {
        "hf": encode_hf,
        "i2_s": encode_i2_s,
        "i2_s_arm": encode_i2_s_arm,
        "i2_s_rows4": encode_i2_s_rows4,
    }
    return encoders[kind](codes)


def decode(kind: str, data: np.ndarray, n: int, k: int) -> np.ndarray:
    """int8 [N, K] codes of any kind; a field of 3 is a ValueError."""
    if kind == "codes":
        return data.reshape(n, k)
    if kind in ("f32", "f16", "bf16"):
        floats = {
            "f32": lambda: data.view(np.float32),
            "f16": lambda: data.view(np.float16).astype(np.float32),
            "bf16": lambda: from_bf16(data.view(np.uint16)),
        }[kind]()
        return absmean(floats.reshape(n, k))[0]
    fields = {
        "hf": decode_hf,
        "tq1_0": decode_tq1_0,
        "tq2_0": decode_tq2_0,
        "i2_s": lambda d, n, k: _decode_groups(d, n, k, 32),
        "i2_s_arm": lambda d, n, k: _decode_groups(d, n, k, 16),
        "i2_s_rows4": decode_i2_s_rows4,
    }[kind](data, n, k)
    if fields.max(initial=0) > 2:
        raise ValueError(f"{kind}: a 2-bit field holds 3")
    return fields.astype(np.int8) - 1
