"""The GGUF container, written in version 3 (its picture stands in :mod:`.gguf`)."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from bitnet_ext.checkpoint.files import written_whole
from bitnet_ext.checkpoint.gguf_constants import (
    ALIGNMENT,
    ARRAY,
    BLOCKS,
    BOOL,
    I2_S,
    I2_S_TAIL,
    MAGIC,
    SCALARS,
    STRING,
    TYPE_NAMES,
)
from bitnet_ext.checkpoint.safetensors import Plan, Progress, write_array

__all__ = ["write_gguf"]

U32, I32, F32, U64, I64 = 4, 5, 6, 10, 11
KINDS = {np.dtype(form): kind for kind, form in SCALARS.items() if kind != BOOL}
NUMBERS = {name: number for number, name in TYPE_NAMES.items()}


def write_gguf(
    path: Path,
    metadata: dict[str, Any],
    plan: Iterable[Plan],
    progress: Progress | None = None,
) -> None:
    """Write metadata and tensors; each tensor is made when its turn comes, and let go after.

    ``plan`` gives (name, type's name, shape outermost first, function that makes the array).
    The file appears under its name only when it is whole; ``progress(done, total)`` after each
    tensor.

    Raises:
        CheckpointError: an array does not have the bytes its plan promised.
    """
    plan = list(plan)
    head = [MAGIC, struct.pack("<IQQ", 3, len(plan), len(metadata))]
    for key, value in metadata.items():
        head += [_string(key), _value(value)]
    sizes, offset = [], 0
    for name, kind, shape, _ in plan:
        head += [_string(name), struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))]
        head.append(struct.pack("<IQ", NUMBERS[kind], offset))
        sizes.append(_size(NUMBERS[kind], shape))
        offset += _padded(sizes[-1])
    raw = b"".join(head)
    with written_whole(path) as file:
        file.write(raw.ljust(_padded(len(raw)), b"\0"))
        for done, ((name, _, _, make), size) in enumerate(zip(plan, sizes, strict=True), 1):
            write_array(file, make(), size, f"{path}: tensor {name!r}")
            file.write(bytes(_padded(size) - size))
            if progress is not None:
                progress(done, len(plan))


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _size(kind: int, shape: tuple[int, ...]) -> int:
    elements = int(np.prod(shape, dtype=np.int64))
    if kind == I2_S:
        return elements // 4 + I2_S_TAIL
    _, per_block, block_bytes = BLOCKS[kind]
    return elements // per_block * block_bytes


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _value(value: Any) -> bytes:
    """Type and value; integers as 32 bits where they fit, floats as float32."""
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        for kind, form, low, high in ((U32, "I", 0, 1 << 32), (I32, "i", -(1 << 31), 0)):
            if low <= value < high:
                return struct.pack(f"<I{form}", kind, value)
        return struct.pack("<IQ", U64, value) if value > 0 else struct.pack("<Iq", I64, value)
    if isinstance(value, float):
        return struct.pack("<If", F32, value)
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, np.ndarray):
        kind = BOOL if value.dtype == bool else KINDS[value.dtype.newbyteorder("<")]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_string, value))
