"""The safetensors format, read with bounds over a memory map, and written.

    8 bytes little-endian n | n bytes of JSON header | data
    header: {"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [start, end]}, ...}

Offsets count from the data's start.  As in the format's own library, tensors cover the data
without hole or overlap.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from bitnet_ext.checkpoint.files import (
    load_json,
    map_file,
    parse_json,
    resolve_inside,
    written_whole,
)
from bitnet_ext.checkpoint.source import Array
from bitnet_ext.errors import CheckpointError, UnsupportedModelError

__all__ = [
    "Plan",
    "Progress",
    "SafetensorsFile",
    "TensorInfo",
    "TensorStore",
    "write_array",
    "write_safetensors",
]

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_RANK = 8
INDEX_NAME = "model.safetensors.index.json"

# Bits per element of every dtype of the format.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# How NumPy sees them; bf16 as its bits.
NUMPY_DTYPES = {
    "BOOL": "u1",
    "U8": "u1",
    "I8": "i1",
    "I16": "<i2",
    "U16": "<u2",
    "F16": "<f2",
    "BF16": "<u2",
    "I32": "<i4",
    "U32": "<u4",
    "F32": "<f4",
    "F64": "<f8",
    "I64": "<i8",
    "U64": "<u8",
}


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's place: bytes [start, end) of its file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One file's header, checked in full, and views of its data.

    Raises:
        CheckpointError: the header contradicts itself, the format or the file's size.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes: npt.NDArray[np.uint8] = map_file(path)
        self.tensors: dict[str, TensorInfo] = {}
        size = len(self._bytes)
        if size < 8:
            raise CheckpointError(f"{path}: found {size} bytes, wanted a safetensors header")
        length = int(self._bytes[:8].view("<u8")[0])
        if length > MAX_HEADER_BYTES or length > size - 8:
            raise CheckpointError(
                f"{path}: found a header length of {length}, wanted at most "
                f"{min(MAX_HEADER_BYTES, size - 8)}"
            )
        header = parse_json(self._bytes[8 : 8 + length].tobytes(), f"{path}: header")
        header.pop("__metadata__", None)
        if len(header) > MAX_TENSORS:
            raise CheckpointError(f"{path}: found {len(header)} tensors, wanted at most 100000")
        infos = [self._info(name, entry, 8 + length) for name, entry in header.items()]
        self._check_cover(infos, 8 + length)
        self.tensors = {info.name: info for info in infos}

    def _info(self, name: str, entry: Any, base: int) -> TensorInfo:
        """Check one header entry by itself."""
        where = f"{self.path}: tensor {name[:200]!r}"
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise CheckpointError(f"{where}: wanted exactly dtype, shape and data_offsets")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise CheckpointError(f"{where}: found dtype {str(dtype)[:40]!r}, which is unknown")
        if not _is_sizes(shape) or len(shape) > MAX_RANK:
            raise CheckpointError(f"{where}: found shape {str(shape)[:80]}, wanted sizes")
        if not _is_sizes(offsets) or len(offsets) != 2:
            raise CheckpointError(f"{where}: found data_offsets {str(offsets)[:80]}, wanted two")
        bits = DTYPE_BITS[dtype]
        for extent in shape:
            bits *= extent
        start, end = base + offsets[0], base + offsets[1]
        if bits % 8 or end - start != bits // 8:
            raise CheckpointError(
                f"{where}: found {end - start} bytes, wanted {bits / 8:g} for {dtype} {shape}"
            )
        return TensorInfo(name, dtype, tuple(shape), start, end)

    def _check_cover(self, infos: list[TensorInfo], base: int) -> None:
        """Tensors follow each other from the data's start to the file's end."""
        reached = base
        for info in sorted(infos, key=lambda i: (i.start, i.end)):
            if info.start != reached:
                raise CheckpointError(
                    f"{self.path}: tensor {info.name[:200]!r}: starts at data offset "
                    f"{info.start - base}, wanted {reached - base}: a hole or an overlap"
                )
            reached = info.end
        if reached != len(self._bytes):
            raise CheckpointError(
                f"{self.path}: tensors end at byte {reached}, the file at {len(self._bytes)}"
            )

    def array(self, name: str) -> Array:
        """A tensor in its shape, read-only; bf16 as uint16 bits, copied only if misaligned."""
        info = self.tensors[name]
        if info.dtype not in NUMPY_DTYPES:
            raise UnsupportedModelError(
                f"{self.path}: tensor {name!r}: dtype {info.dtype} is not read; "
                "save it as F32, F16, BF16 or packed U8"
            )
        raw = self._bytes[info.start : info.end]
        dtype = np.dtype(NUMPY_DTYPES[info.dtype])
        if raw.ctypes.data % dtype.alignment:
            raw = raw.copy()
        return raw.view(dtype).reshape(info.shape)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


class TensorStore:
    """All tensors of a directory: one file, or shards under an index.

    Raises:
        CheckpointError: files or index contradict each other, or lead outside the directory.
    """

    def __init__(self, directory: Path, filename: str | None = None) -> None:
        self.files: dict[str, SafetensorsFile] = {}  # by tensor
        if filename is None and (directory / INDEX_NAME).exists():
            self._open_shards(directory)
            return
        file = SafetensorsFile(resolve_inside(directory, filename or _only_file(directory)))
        self.files = dict.fromkeys(file.tensors, file)

    def _open_shards(self, directory: Path) -> None:
        path = resolve_inside(directory, INDEX_NAME)
        weight_map = load_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{path}: wanted an object 'weight_map' with entries")
        opened: dict[str, SafetensorsFile] = {}
        for tensor, shard in weight_map.items():
            if not isinstance(shard, str) or not shard.endswith(".safetensors"):
                raise CheckpointError(
                    f"{path}: tensor {tensor[:200]!r} stands in {str(shard)[:200]!r}, "
                    "wanted a .safetensors file"
                )
            if shard not in opened:
                opened[shard] = SafetensorsFile(resolve_inside(directory, shard))
            if tensor not in opened[shard].tensors:
                raise CheckpointError(f"{path}: tensor {tensor[:200]!r} is not in {shard!r}")
            self.files[tensor] = opened[shard]
        for shard, file in opened.items():
            unlisted = next((t for t in file.tensors if t not in self.files), None)
            if unlisted is not None:
                raise CheckpointError(
                    f"{path}: tensor {unlisted[:200]!r} of {shard!r} is not in the index"
                )

    def info(self, name: str) -> TensorInfo | None:
        """A tensor's dtype and shape, None where it is absent."""
        file = self.files.get(name)
        return file.tensors[name] if file else None

    def array(self, name: str) -> Array:
        """The tensor's array, see :meth:`SafetensorsFile.array`."""
        return self.files[name].array(name)


def _only_file(directory: Path) -> str:
    """The directory's safetensors file: model.safetensors, or the only one."""
    names = sorted(p.name for p in directory.glob("*.safetensors"))
    if "model.safetensors" in names:
        return "model.safetensors"
    if len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(
            f"{directory}: found {len(names)} .safetensors files without {INDEX_NAME}; "
            "name one with filename="
        )
    pickles = sorted(p.name for p in directory.glob("*.bin")) + sorted(
        p.name for p in directory.glob("*.pt*")
    )
    if pickles:
        raise UnsupportedModelError(
            f"{directory}: found only {pickles[0]}, a pickle, which can run code and is never "
            "read; convert it to model.safetensors first"
        )
    raise CheckpointError(f"{directory}: found no .safetensors or .gguf file")


Plan = tuple[str, str, tuple[int, ...], Callable[[], Array]]  # name, dtype, shape, make
Progress = Callable[[int, int], None]  # tensors done, tensors in all


def write_safetensors(path: Path, plan: Iterable[Plan], progress: Progress | None = None) -> None:
    """Write tensors one at a time; each is made when its turn comes, and let go after.

    ``plan`` gives (name, dtype of the format, shape, function that makes the array).  The file
    appears under its name only when it is whole; ``progress(done, total)`` after each tensor.

    Raises:
        CheckpointError: an array does not have the bytes its plan promised.
    """
    plan = list(plan)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, _ in plan:
        size = DTYPE_BITS[dtype] // 8
        for extent in shape:
            size *= extent
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (offset, offset + size)}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with written_whole(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done, (name, _, _, make) in enumerate(plan, 1):
            start, end = header[name]["data_offsets"]
            write_array(file, make(), end - start, f"{path}: tensor {name!r}")
            if progress is not None:
                progress(done, len(plan))


def write_array(file: BinaryIO, array: Array, size: int, where: str) -> None:
    """Append an array's bytes.

    Raises:
        CheckpointError: they are not as many as promised.
    """
    array = np.ascontiguousarray(array)
    if array.nbytes != size:
        raise CheckpointError(f"{where}: found {array.nbytes} bytes, wanted {size}")
    file.write(array.reshape(-1).view(np.uint8).data)
