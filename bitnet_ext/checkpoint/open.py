"""From a path, "demo" or a hub id to an opened checkpoint."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Literal, cast

from bitnet_ext.checkpoint.files import resolve_inside
from bitnet_ext.checkpoint.gguf_model import GgufCheckpoint
from bitnet_ext.checkpoint.hf import HfCheckpoint
from bitnet_ext.checkpoint.hub import download
from bitnet_ext.checkpoint.source import Checkpoint
from bitnet_ext.errors import CheckpointError

__all__ = ["open_checkpoint"]

I2sLayout = Literal["canonical", "arm", "rows4"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def open_checkpoint(
    path: str | os.PathLike[str],
    *,
    filename: str | None = None,
    i2s_layout: str = "canonical",
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """Open a checkpoint and check everything it promises; weights stay on the disk.

    Args:
        path: a directory with config.json and safetensors, a .gguf file, "demo" (the shipped
            checkpoint; write "./demo" for a folder of that name), or a hub id "owner/name".
        filename: which weight file of the directory or repository to open.
        i2s_layout: byte order of I2_S tensors, which a GGUF file does not tell: "canonical"
            (groups of 128), "arm" (groups of 64) or "rows4" (four rows interleaved).
        revision, token, cache_dir, local_files_only: as in huggingface_hub.

    Raises:
        UnsupportedModelError: well formed, but not a ternary model that runs here.
        CheckpointError: absent, damaged or contradictory.
    """
    if i2s_layout not in ("canonical", "arm", "rows4"):
        raise ValueError(f"i2s_layout: found {i2s_layout!r}, wanted canonical, arm or rows4")
    layout = cast(I2sLayout, i2s_layout)
    if path == "demo":
        path = Path(__file__).resolve().parent.parent / "demo"
    location = Path(path).expanduser()
    if not location.exists():
        if not isinstance(path, str) or not HUB_ID.fullmatch(path):
            raise CheckpointError(f"{path}: no such file or directory (a hub id is 'owner/name')")
        location, filename = download(
            path,
            filename=filename,
            revision=revision,
            token=token,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
        )
    if location.is_dir():
        return _open_directory(location, filename, layout)
    if filename is not None:
        raise CheckpointError(f"{location}: is a file, so filename={filename!r} has no meaning")
    if location.suffix == ".safetensors":
        return HfCheckpoint(location.parent, location.name)
    return GgufCheckpoint(location, layout)


def _open_directory(directory: Path, filename: str | None, i2s_layout: I2sLayout) -> Checkpoint:
    if filename is None:
        ggufs = sorted(p.name for p in directory.glob("*.gguf"))
        if len(ggufs) == 1 and not any(directory.glob("*.safetensors")):
            filename = ggufs[0]
        elif not (directory / "config.json").exists():
            raise CheckpointError(
                f"{directory}: found no config.json and {len(ggufs)} .gguf files; wanted a model "
                "directory, or one .gguf file named with filename="
            )
    if filename is not None and filename.endswith(".gguf"):
        return GgufCheckpoint(resolve_inside(directory, filename), i2s_layout)
    return HfCheckpoint(directory, filename)
