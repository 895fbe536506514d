"""From a row of logits to a token."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core, _sampling
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.generate.config import GenerationConfig
from bitnet_ext.generate.output import TokenLogprobs

__all__ = ["Sampler", "token_logprobs"]

Float32 = npt.NDArray[np.float32]
_NOTHING_SEEN = np.empty(0, np.uint8)


class Sampler:
    """Chooses tokens by a configuration; its buffers are made once.

    Args:
        config: penalty, temperature, top-k, top-p, min-p.
        vocab_size: V.
        seed: of the draws; each depends on (seed, position) alone.
    """

    def __init__(self, config: GenerationConfig, vocab_size: int, seed: int) -> None:
        self._config = config
        self._vocab_size = vocab_size
        self._seed = seed
        size = 0 if config.greedy else vocab_size
        self._weights = np.empty(size, np.float64)
        self._scratch = np.empty(size, np.int64)

    def seen(self, ids: list[int]) -> npt.NDArray[np.uint8]:
        """Marks of the tokens in ``ids``, uint8 [V]; empty where there is no penalty."""
        if self._config.repetition_penalty == 1:
            return _NOTHING_SEEN
        marks = np.zeros(self._vocab_size, np.uint8)
        marks[ids] = 1
        return marks

    @property
    def candidates(self) -> int:
        """How many of the largest logits a choice looks at; 0 for all.

        Beside them it looks at those of the tokens seen, where there is a penalty.
        """
        if self._config.greedy:
            return 1
        return self._config.top_k if self._config.top_k < self._vocab_size else 0

    def choose(self, logits: Float32, seen: npt.NDArray[np.uint8], position: int) -> int:
        """The token for absolute ``position``; ``seen`` then marks it.

        Args:
            logits: float32 [V].
            seen: what :meth:`seen` made.

        Raises:
            InvalidShapeError: every logit is NaN or -inf.
        """
        config = self._config
        if config.greedy:
            token = _sampling.argmax(logits, seen, config.repetition_penalty)
        else:
            token = _sampling.sample(
                logits,
                seen,
                self._weights,
                self._scratch,
                config.repetition_penalty,
                config.temperature,
                min(config.top_k, self._vocab_size),
                config.top_p,
                config.min_p,
                self._seed,
                position,
            )
        self.checked(token, position)
        if len(seen):
            seen[token] = 1
        return token

    def checked(self, token: int, position: int) -> int:
        """``token``, unless it is -1.

        Raises:
            InvalidShapeError: it is: every logit is NaN or -inf.
        """
        if token < 0:
            raise InvalidShapeError(
                f"logits: found none above -inf at position {position}, wanted at least one"
            )
        return token


def token_logprobs(logits: Float32, token: int, count: int) -> TokenLogprobs:
    """Log-softmax of ``logits`` [V] at ``token``, and its ``count`` largest, lowest id on ties."""
    logprobs = _core.log_softmax(logits[None])
    if count == 0:
        return TokenLogprobs(float(logprobs[0, token]), (), ())
    ids, values = _core.topk(logprobs, min(count, logits.size))
    return TokenLogprobs(
        float(logprobs[0, token]), tuple(ids[0].tolist()), tuple(values[0].tolist())
    )
