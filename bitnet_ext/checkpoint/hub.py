"""Checkpoints of the Hugging Face Hub, through huggingface_hub and its cache."""

from __future__ import annotations

import os
from pathlib import Path

from bitnet_ext.checkpoint.hf import TOKENIZER_FILES
from bitnet_ext.errors import CheckpointError

__all__ = ["download"]

# Never a pickle, never code: only these files of a repository's top folder.
PATTERNS = [
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    *TOKENIZER_FILES,
]


def download(
    repo: str,
    *,
    filename: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> tuple[Path, str | None]:
    """Fetch what a repository's checkpoint needs; the snapshot's folder and the file to open.

    With ``filename`` only that weight file comes (beside the small files); without, the
    safetensors files, or the repository's only .gguf file where it has no safetensors.

    Raises:
        CheckpointError: the repository, revision or file cannot be had; says why.
    """
    from huggingface_hub import HfApi, snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=revision,
                token=token,
                cache_dir=None if cache_dir is None else Path(cache_dir),
                local_files_only=local_files_only,
                allow_patterns=patterns,
                ignore_patterns=["*/*"],
            )
        )

    try:
        if filename is not None:
            small = [p for p in PATTERNS if p != "*.safetensors"]
            return fetch([filename, *small]), filename
        folder = fetch(PATTERNS)
        if any(folder.glob("*.safetensors")):
            return folder, None
        if local_files_only:
            names = [p.name for p in folder.glob("*.gguf")]
        else:
            files = HfApi(token=token).list_repo_files(repo, revision=revision)
            names = [n for n in files if n.endswith(".gguf") and "/" not in n]
        if len(names) == 1:
            return fetch(names), names[0]
    # The library raises its own errors, its HTTP client's and the system's; all mean one thing.
    except Exception as error:
        raise CheckpointError(
            f"{repo}: cannot be had from the Hugging Face Hub: {error}"
        ) from error
    raise CheckpointError(
        f"{repo}: found {len(names)} .gguf files and no .safetensors at its top"
        + (f"; name one of {', '.join(sorted(names)[:8])} with filename=" if names else "")
    )
