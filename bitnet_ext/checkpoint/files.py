"""Untrusted files: mapped read-only, kept inside their directory, JSON within limits."""

from __future__ import annotations

import json
import mmap
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import CheckpointError

__all__ = [
    "load_json",
    "map_file",
    "parse_json",
    "release_pages",
    "resolve_inside",
    "written_whole",
]

MAX_JSON_BYTES = 16 << 20
MAX_JSON_CONTAINERS = 400_000  # objects and arrays: bounds what parsing may allocate
MAX_INT_DIGITS = 20  # any 64-bit integer


def map_file(path: Path) -> npt.NDArray[np.uint8]:
    """The bytes of a regular file as a read-only array over a memory map.

    Raises:
        CheckpointError: the file is missing, empty, unreadable or not a regular file.
    """
    # O_NONBLOCK: opening a named pipe must fail here, not wait for a writer.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: found a directory or device, wanted a regular file")
        if status.st_size == 0:
            raise CheckpointError(f"{path}: found 0 bytes, wanted a checkpoint")
        mapping = mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be mapped: {error.strerror}") from error
    finally:
        os.close(fd)
    return np.frombuffer(mapping, np.uint8)


def release_pages(array: npt.NDArray[Any]) -> None:
    """Let the pages of a mapped array leave this process's memory; a later touch reads them again.

    Nothing happens to an array that is no view of :func:`map_file`'s.
    """
    root: Any = array
    while isinstance(root.base, np.ndarray):
        root = root.base
    mapping = getattr(root.base, "obj", None)
    if not isinstance(mapping, mmap.mmap):
        return
    start = array.ctypes.data - root.ctypes.data
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages of this array alone
    length = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if length > 0:
        mapping.madvise(mmap.MADV_DONTNEED, first, length)


def resolve_inside(directory: Path, name: str) -> Path:
    """The path of a file that lies in ``directory`` itself.

    Symbolic links may lead elsewhere in the directory, or to the blobs of the Hugging Face cache
    that the directory is a snapshot of; nowhere else.

    Raises:
        CheckpointError: the name is a path, or the file lies outside.
    """
    if not 0 < len(name) < 256 or name in (".", "..") or any(c in name for c in "/\\\0"):
        raise CheckpointError(
            f"{directory}: found the file name {name[:200]!r}, wanted a plain name"
        )
    path = directory / name
    try:
        real, root = path.resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{path}: its links cannot be followed: {error}") from error
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(base) for base in allowed):
        raise CheckpointError(
            f"{path}: is a link to {real}, wanted a file inside {root}; "
            "copy the file there or open its own directory"
        )
    return path


def load_json(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The object in a JSON file, within the limits of :func:`parse_json`."""
    raw = map_file(path)
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path}: found {len(raw)} bytes of JSON, wanted at most {max_bytes}")
    return parse_json(raw.tobytes(), str(path))


def parse_json(raw: bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object from hostile bytes.

    Refuses duplicate keys, NaN and infinities, integers past 64 bits, nesting that exhausts the
    stack, more than MAX_JSON_CONTAINERS objects and arrays, and anything but UTF-8.

    Raises:
        CheckpointError: named by ``what``.
    """
    containers = raw.count(b"{") + raw.count(b"[")
    if containers > MAX_JSON_CONTAINERS:
        raise CheckpointError(
            f"{what}: found {containers} brackets, wanted at most {MAX_JSON_CONTAINERS}"
        )

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for i, key in enumerate(keys) if key in keys[:i])
            raise CheckpointError(f"{what}: the key {twice[:80]!r} stands twice in one object")
        return found

    def integer(digits: str) -> int:
        if len(digits) > MAX_INT_DIGITS:
            raise CheckpointError(f"{what}: found an integer of {len(digits)} digits")
        return int(digits)

    def constant(name: str) -> NoReturn:
        raise CheckpointError(f"{what}: found {name}, wanted a finite number")

    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=unique,
            parse_int=integer,
            parse_constant=constant,
        )
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{what}: is not UTF-8 at byte {error.start}") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{what}: is not JSON: {error}") from error
    except RecursionError as error:
        raise CheckpointError(f"{what}: its JSON is nested too deep") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what}: found a JSON {type(value).__name__}, wanted an object")
    return value


@contextmanager
def written_whole(path: Path) -> Iterator[BinaryIO]:
    """A new file that gets the name ``path`` when all went well, and leaves nothing otherwise."""
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
