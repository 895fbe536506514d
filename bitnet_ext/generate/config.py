"""What to generate and when to stop."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from bitnet_ext.errors import CheckpointError, InvalidShapeError

__all__ = ["GenerationConfig"]

# fields that generation_config.json has under the same names
_FILE_NAMES = ("max_new_tokens", "min_new_tokens", "top_k", "top_p", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class GenerationConfig:
    """How :func:`bitnet_ext.generate.generate` chooses tokens and when it stops.

    Fields that are not given come from the model's generation_config.json, then from the defaults
    here. Logits pass through the repetition penalty, the temperature, top-k, top-p and min-p, in
    this order, that of transformers.

    Args:
        max_new_tokens: at most this many tokens.
        temperature: 0 is greedy: the largest logit, lowest id on ties; so is ``top_k`` 1.
        top_k: only the k likeliest tokens; 0 keeps all.
        top_p: only the likeliest tokens whose probabilities reach this sum; 1 keeps all
            (arXiv:1904.09751).
        min_p: only tokens at least this share as likely as the likeliest; 0 keeps all
            (arXiv:2407.01082).
        repetition_penalty: of each token of the prompt and the text so far, a positive logit is
            divided by it and a negative one multiplied (arXiv:1909.05858).
        stop: strings that end the text, which is cut before them.
        stop_token_ids: ids that end the text, beside the model's own; they are not returned.
        ignore_eos: go on past the model's own stop ids.
        min_new_tokens: no stop before this many tokens.
        logprobs: also return the log-probability of each token, and those of the k likeliest.
        seed: of the random numbers, which depend on (seed, position) alone; None draws one and
            the output records it.

    Raises:
        InvalidShapeError: a value out of range, named with what is wanted.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    logprobs: int | None = None
    seed: int | None = None

    def __new__(cls, *args: Any, **given: Any) -> Self:
        """Note which fields were given: the others may be filled from the model's file."""
        config = super().__new__(cls)
        names = [f.name for f in fields(cls)][: len(args)]
        object.__setattr__(config, "_given", frozenset(names) | frozenset(given))
        return config

    def __post_init__(self) -> None:
        self._integer("max_new_tokens", 1)
        self._number("temperature", 0, math.inf)
        self._integer("top_k", 0)
        self._number("top_p", 0, 1)
        self._number("min_p", 0, 1)
        self._number("repetition_penalty", 0, math.inf)
        if self.repetition_penalty == 0:
            raise _wrong("repetition_penalty", 0, "a positive number")
        self._strings("stop")
        self._ids("stop_token_ids")
        if not isinstance(self.ignore_eos, bool):
            raise _wrong("ignore_eos", self.ignore_eos, "True or False")
        self._integer("min_new_tokens", 0)
        if self.min_new_tokens > self.max_new_tokens:
            raise _wrong(
                "min_new_tokens",
                self.min_new_tokens,
                f"at most max_new_tokens = {self.max_new_tokens}",
            )
        if self.logprobs is not None:
            self._integer("logprobs", 0)
        if self.seed is not None:
            self._integer("seed", 0, 2**64 - 1)

    @property
    def greedy(self) -> bool:
        """Whether nothing random is drawn."""
        return self.temperature == 0 or self.top_k == 1

    @classmethod
    def from_file(cls, found: Mapping[str, Any]) -> Self:
        """The defaults that a generation_config.json states; keys of no meaning here are skipped.

        Sampling is on where it says ``do_sample``; a file without it is greedy.

        Raises:
            CheckpointError: a value of the wrong kind or out of range.
        """
        values = {n: found[n] for n in _FILE_NAMES if found.get(n) is not None}
        if found.get("stop_strings") is not None:
            values["stop"] = found["stop_strings"]
        if found.get("do_sample"):
            temperature = found.get("temperature")
            values["temperature"] = 1.0 if temperature is None else temperature
        try:
            return cls(**values)
        except (InvalidShapeError, TypeError) as error:
            raise CheckpointError(f"generation_config.json: {error}") from error

    def filled(self, config: GenerationConfig | None, overrides: Mapping[str, Any]) -> Self:
        """This configuration under the fields given in ``config`` and, above it, ``overrides``.

        Raises:
            TypeError: an override that is no field.
        """
        names = [f.name for f in fields(self)]
        unknown = [name for name in overrides if name not in names]
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r}, wanted one of {', '.join(names)}")
        values = {name: getattr(self, name) for name in names}
        if config is not None:
            if not isinstance(config, GenerationConfig):
                raise TypeError(f"config: found {type(config).__name__}, wanted GenerationConfig")
            given: frozenset[str] = vars(config)["_given"]
            values |= {name: getattr(config, name) for name in given}
        return type(self)(**(values | dict(overrides)))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _integer(self, name: str, low: int, high: float = math.inf) -> None:
        found = getattr(self, name)
        wanted = f"an integer of {low} or more" if high == math.inf else f"{low} to {high}"
        try:
            value = operator.index(found)
        except TypeError:
            raise _wrong(name, found, wanted) from None
        if isinstance(found, bool) or not low <= value <= high:
            raise _wrong(name, found, wanted)
        self._set(name, value)

    def _number(self, name: str, low: float, high: float) -> None:
        found = getattr(self, name)
        wanted = f"a finite number of {low} or more" if high == math.inf else f"{low} to {high}"
        try:
            value = math.nan if isinstance(found, str | bool) else float(found)
        except (TypeError, ValueError, OverflowError):
            raise _wrong(name, found, wanted) from None
        if not (low <= value <= high and math.isfinite(value)):
            raise _wrong(name, found, wanted)
        self._set(name, value)

    def _strings(self, name: str) -> None:
        found = getattr(self, name)
        values = (found,) if isinstance(found, str) else _tuple(name, found, "strings")
        for value in values:
            if not isinstance(value, str) or not value:
                raise _wrong(name, value, "strings of at least one character")
        self._set(name, values)

    def _ids(self, name: str) -> None:
        found = getattr(self, name)
        values = (found,) if hasattr(found, "__index__") else _tuple(name, found, "token ids")
        for value in values:
            if not hasattr(value, "__index__") or isinstance(value, bool) or value < 0:
                raise _wrong(name, value, "token ids of 0 or more")
        self._set(name, tuple(operator.index(value) for value in values))


def _tuple(name: str, found: Any, of: str) -> tuple[Any, ...]:
    if not isinstance(found, Iterable) or isinstance(found, bytes | Mapping):
        raise _wrong(name, found, f"a list of {of}")
    return tuple(found)


def _wrong(name: str, found: Any, wanted: str) -> InvalidShapeError:
    return InvalidShapeError(f"{name}: found {found!r:.80}, wanted {wanted}")
