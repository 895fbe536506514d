"""What generation returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["FinishReason", "GenerationChunk", "GenerationOutput", "Timings", "TokenLogprobs"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class TokenLogprobs:
    """Natural-log probabilities at one generated token, of the model's logits as they are.

    ``logprob`` is the token's own; ``top_ids`` and ``top_logprobs`` the k likeliest, best first.
    """

    logprob: float
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True)
class Timings:
    """Time of one call; of a batch, all its sequences together.

    ``prefill_tokens`` counts the prompt tokens that were run (not those found in a cache), up to
    the choice of the first new token; ``decode_tokens`` the tokens after the first.
    """

    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return self.prefill_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Speed of generation."""
        return self.decode_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class GenerationOutput:
    """A finished text; ``str()`` gives it.

    Attributes:
        text: the new text, cut before a stop string.
        token_ids: the new tokens, without a stop id, with the tokens of a stop string.
        prompt_token_ids: the prompt as the model saw it.
        finish_reason: "stop", or "length" where max_new_tokens or the context was reached.
        stop_reason: the id or string that stopped it, None for "length".
        logprobs: for each of ``token_ids``, where asked for.
        timings: of the call.
        seed: of the random numbers, None where nothing was random.
    """

    text: str
    token_ids: list[int]
    prompt_token_ids: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: list[TokenLogprobs] | None
    timings: Timings
    seed: int | None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GenerationChunk:
    """A piece of a text as it comes.

    ``index`` tells the prompt; ``text`` joins up to the output's text, ``token_ids`` to its ids;
    ``finish_reason`` stands in a sequence's last chunk only.
    """

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
