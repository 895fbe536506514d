"""One sequence while it is generated: its ids, its text, and whether it is at its end."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field

from bitnet_ext.generate.config import GenerationConfig
from bitnet_ext.generate.output import (
    FinishReason,
    GenerationChunk,
    GenerationOutput,
    Timings,
    TokenLogprobs,
)
from bitnet_ext.generate.pieces import StreamDecoder

__all__ = ["Sequence", "StopFinder"]


class StopFinder:
    """Passes text on until a stop string appears; holds back what may be the start of one."""

    def __init__(self, stops: Seq[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that is certain, the stop string found in it or None); it is cut before it."""
        held = self._held + text
        found = [(at, stop) for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            at, stop = min(found, key=lambda hit: hit[0])
            self._held = ""
            return held[:at], stop
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        certain = len(held) - keep
        self._held = held[certain:]
        return held[:certain], None

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of ``text`` that begin ``stop``."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-size:]):
            return size
    return 0


@dataclass
class Sequence:
    """One prompt and what came after it.

    ``limit`` is the number of tokens, prompt included, that the context or the cache has room for.
    """

    index: int
    prompt: list[int]
    config: GenerationConfig
    stop_ids: frozenset[int]
    limit: int
    decoder: StreamDecoder | None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    def __post_init__(self) -> None:
        self._finder = StopFinder(self.config.stop)
        self._text: list[str] = []
        self._reported = 0  # tokens that a chunk has told of

    @property
    def length(self) -> int:
        """Tokens so far, prompt included: the position of the next one."""
        return len(self.prompt) + len(self.token_ids)

    @property
    def may_stop(self) -> bool:
        """Whether the next token may be the last."""
        return len(self.token_ids) >= self.config.min_new_tokens

    def push(self, token: int) -> GenerationChunk | None:
        """Take the next token; a chunk when there is text or an end to tell of."""
        if token in self.stop_ids and self.may_stop:
            return self._finish("stop", token)
        self.token_ids.append(token)
        text, stop = self._read(token)
        if stop is not None:
            self._text.append(text)
            return self._finish("stop", stop, text)
        if len(self.token_ids) == self.config.max_new_tokens or self.length == self.limit:
            self._text.append(text)
            return self._finish("length", None, text)
        if not text:
            return None
        self._text.append(text)
        return self._chunk(text)

    def _read(self, token: int) -> tuple[str, str | None]:
        text = self.decoder.push(token) if self.decoder is not None else ""
        if len(self.token_ids) <= self.config.min_new_tokens:
            return text, None
        return self._finder.push(text)

    def _finish(
        self, reason: FinishReason, stop_reason: int | str | None, text: str = ""
    ) -> GenerationChunk:
        self.finish_reason, self.stop_reason = reason, stop_reason
        if not isinstance(stop_reason, str):
            rest = self._finder.flush() + (self.decoder.flush() if self.decoder else "")
            self._text.append(rest)
            text += rest
        return self._chunk(text)

    def _chunk(self, text: str) -> GenerationChunk:
        ids = self.token_ids[self._reported :]
        self._reported = len(self.token_ids)
        return GenerationChunk(self.index, text, ids, self.finish_reason)

    def output(self, timings: Timings, seed: int | None) -> GenerationOutput:
        """The finished sequence."""
        assert self.finish_reason is not None
        return GenerationOutput(
            text="".join(self._text),
            token_ids=self.token_ids,
            prompt_token_ids=self.prompt,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            logprobs=None if self.config.logprobs is None else self.logprobs,
            timings=timings,
            seed=seed,
        )
