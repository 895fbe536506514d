"""``BitNetModel``: what a user holds; the transformer with its tokenizer, text in and text out."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, overload

from bitnet_ext.config import BitNetConfig
from bitnet_ext.errors import (
    CheckpointError,
    DeviceUnavailableError,
    InvalidShapeError,
    UnsupportedModelError,
)
from bitnet_ext.gpu import device as cuda
from bitnet_ext.gpu.attend import Precision
from bitnet_ext.memory.kv_cache import KVCache, KvDtype
from bitnet_ext.model.load import RandomWeights, load_weights
from bitnet_ext.model.transformer import Transformer

if TYPE_CHECKING:
    from bitnet_ext.checkpoint import Checkpoint
    from bitnet_ext.generate import GenerationConfig, GenerationOutput, GenerationStream
    from bitnet_ext.generate.tokenizer import Tokenizer
    from bitnet_ext.score import Score

__all__ = ["BitNetModel", "place_of"]


class BitNetModel(Transformer):
    """A ternary transformer with its tokenizer and generation defaults.

    Make one with :meth:`from_pretrained` or :meth:`random`. One model serves several Python
    threads, each with a cache of its own. It pickles as (path, options).
    """

    _origin: tuple[Any, ...]
    _checkpoint: Checkpoint | None = None
    _tokenizer: Tokenizer | None = None

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: str = "cpu",
        kv_dtype: KvDtype = "f32",
        head: Literal["exact", "int8"] = "exact",
        precision: Precision = "f32",
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        filename: str | None = None,
        i2s_layout: str = "canonical",
    ) -> Self:
        """Load a checkpoint as published: weights are packed while they are read.

        Args:
            path: a directory, a .gguf file, "demo" (the shipped model; "./demo" is a path), or a
                Hugging Face hub id.
            device: "cpu", "cuda" (the current CUDA device), or "auto": "cuda" where there is one.
            kv_dtype: storage of keys and values: "f32", "f16" or "int8" (each token's rounded
                once, and every path attends to the rounded values).
            head: "exact" projects on the vocabulary as stored; "int8" on a row-wise int8 copy,
                a quarter to half the bytes, near-lossless.
            precision: of attention on a CUDA device: "f32" has the CPU's bits; "f16" and "bf16" run
                on the matrix units, with errors of about 1e-3 and 1e-2 of the largest value.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.
            filename: the file of a hub repository to load, a .gguf for one.
            i2s_layout: byte layout of I2_S tensors in a GGUF file, which its metadata lacks.

        Raises:
            CheckpointError: bytes that contradict themselves; UnsupportedModelError: a model
                that this version cannot run.
            DeviceUnavailableError: a device that is absent.
            FileNotFoundError: no such path.
        """
        options: dict[str, Any] = {
            "revision": revision,
            "token": token,
            "cache_dir": cache_dir,
            "local_files_only": local_files_only,
            "filename": filename,
            "i2s_layout": i2s_layout,
        }
        return cls._load(
            path, options, device=device, kv_dtype=kv_dtype, head=head, precision=precision
        )

    @classmethod
    def _load(
        cls,
        path: str | os.PathLike[str],
        options: dict[str, Any],
        *,
        device: str = "cpu",
        kv_dtype: KvDtype = "f32",
        head: Literal["exact", "int8"] = "exact",
        precision: Precision = "f32",
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """:meth:`from_pretrained`; ``progress(done, total)`` after each packed layer."""
        place = place_of(device)
        _check_choice("kv_dtype", kv_dtype, ("f32", "f16", "int8"))
        _check_choice("head", head, ("exact", "int8"))
        _check_choice("precision", precision, ("f32", "f16", "bf16"))
        from bitnet_ext.checkpoint import open_checkpoint

        checkpoint = open_checkpoint(path, **options)
        weights = load_weights(checkpoint, head, progress)
        model = cls(checkpoint.config, weights, kv_dtype, place, precision)
        model._checkpoint = checkpoint
        choices = {"device": device, "kv_dtype": kv_dtype, "head": head, "precision": precision}
        model._origin = (
            _reload,
            (path, {**choices, **options}),
        )
        return model

    @classmethod
    def random(
        cls,
        config: BitNetConfig,
        seed: int = 0,
        *,
        kv_dtype: KvDtype = "f32",
        device: str = "cpu",
        precision: Precision = "f32",
    ) -> Self:
        """A model of random weights, for benches and tests; it has no tokenizer."""
        place = place_of(device)
        model = cls(config, load_weights(RandomWeights(config, seed)), kv_dtype, place, precision)
        model._origin = (_random, (config, seed, kv_dtype, device, precision))
        return model

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer.

        Raises:
            CheckpointError: the model has none.
        """
        if self._tokenizer is None:
            if self._checkpoint is None:
                raise CheckpointError("tokenizer: a model of random weights has none; pass ids")
            from bitnet_ext.generate.tokenizer import Tokenizer

            self._tokenizer = Tokenizer.from_checkpoint(self._checkpoint)
        return self._tokenizer

    @property
    def has_tokenizer(self) -> bool:
        """Whether the model came with a tokenizer."""
        if self._checkpoint is None:
            return False
        from bitnet_ext.checkpoint.gguf_constants import NO_TOKENIZER

        files = self._checkpoint.tokenizer_files()
        return (
            "tokenizer.json" in files
            or "tokenizer.model" in files
            or self._checkpoint.gguf_metadata.get("tokenizer.ggml.model", NO_TOKENIZER)
            != NO_TOKENIZER
        )

    @property
    def generation_config(self) -> GenerationConfig:
        """Defaults of :meth:`generate`: the checkpoint's own over the library's."""
        from bitnet_ext.generate import GenerationConfig

        found = self._checkpoint.generation_config if self._checkpoint is not None else {}
        return GenerationConfig.from_file(found)

    @overload
    def generate(
        self,
        prompts: str,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> GenerationOutput: ...
    @overload
    def generate(
        self,
        prompts: list[str],
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> list[GenerationOutput]: ...
    @overload
    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[True],
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> GenerationStream: ...
    @overload
    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | None = None,
        *,
        stream: bool = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> Any: ...
    def generate(
        self,
        prompts: Any,
        config: GenerationConfig | None = None,
        *,
        stream: bool = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> Any:
        """Continue one prompt or several; see :func:`bitnet_ext.generate.generate`."""
        from bitnet_ext.generate import generate

        return generate(self, prompts, config, stream=stream, cache=cache, **overrides)

    @overload
    def chat(
        self,
        messages: Any,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[False] = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> GenerationOutput: ...
    @overload
    def chat(
        self,
        messages: Any,
        config: GenerationConfig | None = None,
        *,
        stream: Literal[True],
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> GenerationStream: ...
    def chat(
        self,
        messages: Any,
        config: GenerationConfig | None = None,
        *,
        stream: bool = False,
        cache: KVCache | None = None,
        **overrides: Any,
    ) -> Any:
        """Answer a conversation; see :func:`bitnet_ext.generate.chat`."""
        from bitnet_ext.generate import chat

        return chat(self, messages, config, stream=stream, cache=cache, **overrides)

    def score(
        self,
        inputs: Any,
        *,
        context: Any = None,
        add_bos: bool | Literal["auto"] = "auto",
        stride: int | None = None,
    ) -> Score | list[Score]:
        """Log-probabilities of given tokens; see :func:`bitnet_ext.score.score`."""
        from bitnet_ext.score import score

        return score(self, inputs, context=context, add_bos=add_bos, stride=stride)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        *,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write the packed Hugging Face form, see :func:`bitnet_ext.checkpoint.save_model`.

        The tokenizer's files are copied; a GGUF file's is written as tokenizer.json, where its
        kind is known.  ``progress(done, total)`` is called after each tensor.

        Raises:
            CheckpointError: other files stand in the directory, or the model has no checkpoint
                form, as one with an int8 head alone.
        """
        from bitnet_ext.checkpoint import save_model

        texts: dict[str, str] = {}
        if self.has_tokenizer and self._checkpoint and not self._checkpoint.tokenizer_files():
            with suppress(UnsupportedModelError):
                texts = self.tokenizer.to_files()
        weights = self._engine.weights
        save_model(Path(directory), self.config, weights, self._checkpoint, progress, texts)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._origin


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InvalidShapeError(f"{name}: found {value!r}, wanted one of {', '.join(choices)}")


def _reload(path: Any, options: dict[str, Any]) -> BitNetModel:
    return BitNetModel.from_pretrained(path, **options)


def _random(
    config: BitNetConfig, seed: int, kv_dtype: KvDtype, device: str, precision: Precision
) -> BitNetModel:
    return BitNetModel.random(config, seed, kv_dtype=kv_dtype, device=device, precision=precision)


def place_of(wanted: str) -> Literal["cpu", "cuda"]:
    """Where a model goes that is asked for on ``wanted``: "cpu", "cuda" or "auto".

    Raises:
        DeviceUnavailableError: it is not there, or nothing of this name.
    """
    if wanted not in ("cpu", "cuda", "auto"):
        raise DeviceUnavailableError(f"device: found {wanted!r}, wanted 'cpu', 'cuda' or 'auto'")
    if wanted == "cpu":
        return "cpu"
    try:
        cuda.cuda_device()
    except DeviceUnavailableError:
        if wanted == "cuda":
            raise
        return "cpu"
    return "cuda"
