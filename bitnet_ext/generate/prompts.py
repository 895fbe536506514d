"""Prompts of any accepted form, as checked token ids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.interchange import is_array, to_host

if TYPE_CHECKING:
    from bitnet_ext.api import BitNetModel

__all__ = ["read_ids", "read_prompts"]


def read_prompts(model: BitNetModel, prompts: Any) -> tuple[list[list[int]], bool]:
    """(ids of each prompt, whether one prompt was given instead of a list).

    A prompt is a string, or ids: a list, a tuple or an int array [T]; several are a list of
    prompts, or an int array [B, T]. Arrays of any library with DLPack; a device's are copied.

    Raises:
        InvalidShapeError: another kind, no token at all, an id outside the vocabulary.
        CheckpointError: a string for a model without a tokenizer.
    """
    if isinstance(prompts, str):
        return [_ids(model, prompts, "prompts")], True
    if is_array(prompts):
        prompts = to_host("prompts", prompts)
        if prompts.ndim not in (1, 2):
            raise InvalidShapeError(f"prompts: found shape {prompts.shape}, wanted [T] or [B, T]")
        single = prompts.ndim == 1
    elif isinstance(prompts, list | tuple):
        single = not any(isinstance(p, str | list | tuple) or is_array(p) for p in prompts)
    else:
        raise InvalidShapeError(
            f"prompts: found {type(prompts).__name__}, wanted a string, token ids or a list of them"
        )
    if len(prompts) == 0:
        raise InvalidShapeError("prompts: found none, wanted at least one token or one prompt")
    if single:
        return [_ids(model, prompts, "prompts")], True
    return [_ids(model, prompt, f"prompts[{i}]") for i, prompt in enumerate(prompts)], False


def _ids(model: BitNetModel, prompt: Any, name: str) -> list[int]:
    ids = read_ids(model, prompt, name)
    if not ids:
        hint = "; the tokenizer puts no token in front of a text" if prompt == "" else ""
        raise InvalidShapeError(f"{name}: found no tokens, wanted at least one{hint}")
    return ids


def read_ids(
    model: BitNetModel, text: Any, name: str, *, add_special_tokens: bool = True
) -> list[int]:
    """The ids of a string, or ids checked; there may be none.

    Raises:
        InvalidShapeError: neither a string nor one row of ids inside the vocabulary.
        CheckpointError: a string for a model without a tokenizer.
    """
    if isinstance(text, str):
        return model.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    ids = to_host(name, text) if isinstance(text, list | tuple) or is_array(text) else None
    if ids is None or ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        found = type(text).__name__ if ids is None else f"{ids.dtype} {ids.shape}"
        raise InvalidShapeError(f"{name}: found {found}, wanted a string or token ids [T]")
    vocab = model.config.vocab_size
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab:
        bad = int(ids[(ids < 0) | (ids >= vocab)][0])
        raise InvalidShapeError(f"{name}: found the id {bad}, wanted 0 to {vocab - 1}")
    found_ids: list[int] = ids.tolist()
    return found_ids
