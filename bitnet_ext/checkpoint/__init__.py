"""Checkpoints as published: untrusted bytes in, checked ternary sources and tables out."""

from bitnet_ext.checkpoint.gguf_save import save_gguf
from bitnet_ext.checkpoint.hf_save import save_model
from bitnet_ext.checkpoint.open import open_checkpoint
from bitnet_ext.checkpoint.source import Checkpoint, Table, TernarySource

__all__ = [
    "Checkpoint",
    "Table",
    "TernarySource",
    "open_checkpoint",
    "save_gguf",
    "save_model",
]
