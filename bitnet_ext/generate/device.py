"""Tokens chosen where the model runs: a step of a generation as one graph of a CUDA device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.generate.config import GenerationConfig
from bitnet_ext.gpu.sample import Choice, DeviceSampler
from bitnet_ext.memory.kv_cache import KVCache
from bitnet_ext.model.device_engine import DecodeStep, DeviceEngine

if TYPE_CHECKING:
    from bitnet_ext.api import BitNetModel

__all__ = ["DeviceSteps", "host_logits"]

Int32 = npt.NDArray[np.int32]
Float32 = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]


class DeviceSteps:
    """A step appends the tokens chosen last, and chooses the next ones; only these, int32 [B], come
    to the host.

    Args:
        seen: uint8 [V] for each sequence, marks of its tokens; empty where there is no penalty.
        candidates: how many of the largest logits beside those a choice looks at; 0 for all.
    """

    def __init__(
        self,
        model: BitNetModel,
        cache: KVCache,
        config: GenerationConfig,
        seed: int,
        seen: list[npt.NDArray[np.uint8]],
        candidates: int = 0,
    ) -> None:
        engine = model._engine
        assert isinstance(engine, DeviceEngine)
        shape = len(seen), model.config.vocab_size
        choice = Choice(
            config.greedy,
            config.repetition_penalty,
            config.temperature,
            min(config.top_k, shape[1]),
            config.top_p,
            config.min_p,
            seed,
        )
        self._model, self._cache, self._engine = model, cache, engine
        self._logits = engine.empty(shape)
        self._sampler = DeviceSampler(engine.gpu, *shape, choice)
        self._seen = engine.gpu.to_device(np.stack(seen)) if len(seen[0]) else None
        self._top = engine.head.top(shape[0], candidates)
        self._step = DecodeStep(engine, cache, self._project_and_choose)

    def keep(self, rows: list[int], logits: Any) -> None:
        """Take the logits of sequences whose prompts have ended, float32 [B, V] on the device."""
        for row in rows:
            self._logits[row] = logits[row]

    def first(self) -> Int32:
        """The first token of each sequence; -1 where every logit is NaN or -inf."""
        self._choose(self._step)
        return self._tokens()

    def next(self, active: Mask, tokens: Int32) -> Int32:
        """Append ``tokens``, those chosen last, of the active sequences; the next of each."""
        self._step.put_active(active)
        with self._model._appending(self._cache, active.astype(np.int32), tokens[active]):
            self._step.run()
        return self._tokens()

    def _tokens(self) -> Int32:
        return self._engine.gpu.to_host(self._step.ids)

    def _project_and_choose(self, step: DecodeStep) -> None:
        if self._top is None:
            self._engine.project(step.hidden, self._logits, step.active)
        else:
            self._top.project(step.hidden, self._logits, step.active, self._seen)
        self._choose(step)

    def _choose(self, step: DecodeStep) -> None:
        positions = step.cache.lengths
        self._sampler.choose(self._logits, positions, step.ids, self._seen, step.active)


def host_logits(model: BitNetModel, logits: Any) -> Float32:
    """Logits of a model on a device as an array of the host."""
    engine = model._engine
    assert isinstance(engine, DeviceEngine)
    return engine.gpu.to_host(logits)
