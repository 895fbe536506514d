"""The GGUF container, read with bounds over a memory map.

    "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata: key string | type u32 | value          strings are u64 length + UTF-8
    tensors:  name string | rank u32 | extents u64.. | type u32 | offset u64
    padding to the alignment | data

Extents stand innermost first: a matrix [N, K] is written (K, N).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.files import map_file
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
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = ["GgufFile", "GgufTensor"]

MAX_KEYS = 10_000
MAX_TENSORS = 100_000
MAX_KEY_BYTES = 65_535
MAX_STRINGS = 4_000_000  # in one file: bounds the Python objects that metadata may make
MAX_RANK = 4
MAX_NESTING = 4


@dataclass(frozen=True)
class GgufTensor:
    """A tensor's place: bytes [start, end) of the file; ``shape`` outermost first."""

    name: str
    type: int
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def type_name(self) -> str:
        """The type's name, or its number."""
        return TYPE_NAMES.get(self.type, f"type {self.type}")


class GgufFile:
    """Metadata and tensor table of a GGUF file, checked in full, and views of its data.

    ``metadata`` maps keys to bool, int, float, str, NumPy arrays of scalars, or lists.

    Raises:
        UnsupportedModelError: another version or byte order, or a tensor type of unknown size.
        CheckpointError: the header contradicts itself, the format or the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.bytes: npt.NDArray[np.uint8] = map_file(path)
        self._view = self.bytes.data
        self._at = 0
        self._strings = 0
        tensor_count, key_count = self._header()
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            self._key_value()
        infos = [self._tensor_info() for _ in range(tensor_count)]
        self.tensors: dict[str, GgufTensor] = {}
        self._place(infos)

    def _fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {what} (at byte {self._at})")

    def _take(self, size: int, what: str) -> int:
        """Claim the next ``size`` bytes; where they start."""
        start = self._at
        if size > len(self.bytes) - start:
            raise self._fail(f"{what}: wanted {size} bytes, {len(self.bytes) - start} are left")
        self._at = start + size
        return start

    def _number(self, form: str, size: int, what: str) -> Any:
        return struct.unpack_from(form, self._view, self._take(size, what))[0]

    def _string(self, what: str, limit: int | None = None) -> str:
        length = self._number("<Q", 8, what)
        if limit is not None and length > limit:
            raise self._fail(f"{what}: found a string of {length} bytes, wanted at most {limit}")
        start = self._take(length, what)
        try:
            return str(self._view[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self._fail(f"{what}: found a string that is not UTF-8") from error

    def _header(self) -> tuple[int, int]:
        magic = self._view[self._take(4, "magic") : 4].tobytes()
        if magic != MAGIC:
            raise self._fail(f"found the magic {magic!r}, wanted {MAGIC!r}")
        version = self._number("<I", 4, "version")
        if version not in (2, 3):
            swapped = version and version & 0xFFFF == 0
            raise UnsupportedModelError(
                f"{self.path}: found GGUF version {version}, wanted 2 or 3"
                + ("; big-endian files are not read" if swapped else "; convert the file anew")
            )
        tensors = self._number("<Q", 8, "tensor count")
        keys = self._number("<Q", 8, "metadata count")
        left = len(self.bytes) - self._at
        if tensors > min(MAX_TENSORS, left // 24) or keys > min(MAX_KEYS, left // 13):
            raise self._fail(f"found {tensors} tensors and {keys} keys in {left} bytes")
        return tensors, keys

    def _key_value(self) -> None:
        key = self._string("metadata key", MAX_KEY_BYTES)
        if key in self.metadata:
            raise self._fail(f"the metadata key {key[:80]!r} stands twice")
        kind = self._number("<I", 4, f"type of {key[:80]}")
        self.metadata[key] = self._value(kind, key[:80], 0)

    def _value(self, kind: int, key: str, depth: int) -> Any:
        if kind in SCALARS:
            value = self._scalars(kind, 1, key)[0].item()
            return bool(value) if kind == BOOL else value
        if kind == STRING:
            self._count_strings(1, key)
            return self._string(key)
        if kind != ARRAY:
            raise self._fail(f"{key}: found the value type {kind}, which is unknown")
        if depth == MAX_NESTING:
            raise self._fail(f"{key}: arrays are nested deeper than {MAX_NESTING}")
        inner = self._number("<I", 4, key)
        count = self._number("<Q", 8, key)
        if inner in SCALARS:
            return self._scalars(inner, count, key)
        smallest = 8 if inner == STRING else 12
        if count > (len(self.bytes) - self._at) // smallest:
            raise self._fail(f"{key}: found an array of {count}, more than the file can hold")
        self._count_strings(count, key)
        if inner == STRING:
            return self._string_array(count, key)
        return [self._value(inner, key, depth + 1) for _ in range(count)]

    def _string_array(self, count: int, key: str) -> list[str]:
        """A vocabulary's strings: one tight loop, since there may be hundreds of thousands."""
        view, at, size = self._view, self._at, len(self.bytes)
        length_at = struct.Struct("<Q").unpack_from
        found: list[str] = []
        try:
            for _ in range(count):
                start = at + 8
                at = start + length_at(view, at)[0]
                if at > size:
                    raise self._fail(f"{key}: string {len(found)} ends at {at}, the file at {size}")
                found.append(str(view[start:at], "utf-8"))
        except UnicodeDecodeError as error:
            raise self._fail(f"{key}: string {len(found)} is not UTF-8") from error
        except struct.error as error:
            raise self._fail(f"{key}: the file ends inside string {len(found)}") from error
        self._at = at
        return found

    def _count_strings(self, count: int, key: str) -> None:
        self._strings += count
        if self._strings > MAX_STRINGS:
            raise self._fail(f"{key}: found more than {MAX_STRINGS} strings and arrays")

    def _scalars(self, kind: int, count: int, key: str) -> npt.NDArray[Any]:
        """A view of the file, perhaps misaligned: a lying count allocates nothing."""
        dtype = np.dtype(SCALARS[kind])
        start = self._take(count * dtype.itemsize, key)
        values: npt.NDArray[Any] = np.ndarray(count, dtype, self.bytes.data, start)
        if kind == BOOL and values.max(initial=0) > 1:
            raise self._fail(f"{key}: found the boolean {values.max()}, wanted 0 or 1")
        return values

    def _tensor_info(self) -> tuple[str, int, tuple[int, ...], int]:
        name = self._string("tensor name", MAX_KEY_BYTES)
        rank = self._number("<I", 4, f"tensor {name[:200]!r}")
        if rank > MAX_RANK:
            raise self._fail(f"tensor {name[:200]!r}: found rank {rank}, wanted at most 4")
        extents = [self._number("<Q", 8, f"tensor {name[:200]!r}") for _ in range(rank)]
        kind = self._number("<I", 4, f"tensor {name[:200]!r}")
        offset = self._number("<Q", 8, f"tensor {name[:200]!r}")
        return name, kind, tuple(reversed(extents)), offset

    def _place(self, infos: list[tuple[str, int, tuple[int, ...], int]]) -> None:
        """Give each tensor its bytes: aligned, inside the file, none shared."""
        alignment = self.metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment % 8:
            raise self._fail(f"general.alignment: found {alignment!r}, wanted a multiple of 8")
        base = -(-self._at // alignment) * alignment
        for name, kind, shape, offset in infos:
            if name in self.tensors:
                raise self._fail(f"the tensor {name[:200]!r} stands twice")
            start = base + offset
            end = start + self._size(name, kind, shape)
            if offset % alignment or end > len(self.bytes):
                raise self._fail(
                    f"tensor {name[:200]!r}: found bytes {start} to {end}, wanted a multiple of "
                    f"{alignment} behind {base}, inside {len(self.bytes)}"
                )
            self.tensors[name] = GgufTensor(name, kind, shape, start, end)
        reached, before = base, ""
        for tensor in sorted(self.tensors.values(), key=lambda t: (t.start, t.end)):
            if tensor.start < reached:
                raise self._fail(f"the tensors {before[:200]!r} and {tensor.name[:200]!r} overlap")
            reached, before = tensor.end, tensor.name

    def _size(self, name: str, kind: int, shape: tuple[int, ...]) -> int:
        """Bytes of a tensor."""
        elements = 1
        for extent in shape:
            elements *= extent
        if kind == I2_S:
            if elements % 4:
                raise self._fail(f"tensor {name[:200]!r}: found I2_S {list(shape)}, wanted x4")
            return elements // 4 + I2_S_TAIL
        if kind not in BLOCKS:
            raise UnsupportedModelError(unsupported_type(str(self.path), name, kind))
        type_name, per_block, block_bytes = BLOCKS[kind]
        inner = shape[-1] if shape else 1
        if inner % per_block:
            raise self._fail(
                f"tensor {name[:200]!r}: found {type_name} {list(shape)}, wanted rows of a "
                f"multiple of {per_block}"
            )
        return elements // per_block * block_bytes

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of a tensor, read-only."""
        tensor = self.tensors[name]
        return self.bytes[tensor.start : tensor.end]


def unsupported_type(path: str, name: str, kind: int) -> str:
    """What to say about a tensor of a type that is not read."""
    found = TYPE_NAMES.get(kind, "unknown")
    text = f"{path}: tensor {name[:200]!r}: type {found} ({kind}) is not read; "
    if kind in (38, 39):
        return text + (
            "its bytes depend on a tile configuration that the file does not hold: convert the "
            "original checkpoint to I2_S, TQ1_0 or TQ2_0"
        )
    return text + (
        "use a file with TQ1_0, TQ2_0, I2_S, F16, BF16 or F32 linear layers and F32, F16, BF16, "
        "Q8_0, Q6_K, Q4_K or Q4_0 embeddings"
    )
