"""Prefill the prompts, then one token at a time: ragged batches, streams, reuse of a cache."""

from __future__ import annotations

import secrets
from collections.abc import Generator, Iterator
from contextlib import suppress
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import ContextLengthError, InvalidShapeError, UnsupportedModelError
from bitnet_ext.generate.config import GenerationConfig
from bitnet_ext.generate.device import DeviceSteps, host_logits
from bitnet_ext.generate.output import GenerationChunk, GenerationOutput, Timings
from bitnet_ext.generate.prompts import read_prompts
from bitnet_ext.generate.sampling import Sampler, token_logprobs
from bitnet_ext.generate.sequence import Sequence
from bitnet_ext.memory.kv_cache import KVCache

if TYPE_CHECKING:
    from bitnet_ext.api import BitNetModel
    from bitnet_ext.generate.tokenizer import Tokenizer

__all__ = ["GenerationStream", "chat", "generate"]

PREFILL_CHUNK = 512  # tokens run between two looks at whether the stream was closed


def generate(
    model: BitNetModel,
    prompts: Any,
    config: GenerationConfig | None = None,
    *,
    stream: bool = False,
    cache: KVCache | None = None,
    **overrides: Any,
) -> GenerationOutput | list[GenerationOutput] | GenerationStream:
    """Continue one prompt or several.

    Several run as one ragged batch, in which each stops by itself and gets the tokens that it
    would get alone.

    Args:
        prompts: a string or token ids, or a list of them.
        config: fields that are not given come from the model's generation_config.json.
        stream: return an iterator of :class:`GenerationChunk` instead.
        cache: one sequence a prompt. Tokens that it shares with the front of a prompt are not run
            again; afterwards it holds prompt and new tokens (the last one is never run). Where an
            error or an interrupt ends the call, only the shared tokens stay.
        overrides: fields of GenerationConfig, above ``config``.

    Returns:
        GenerationOutput, or a list of them for a list of prompts.

    Raises:
        TypeError: an unknown override.
        InvalidShapeError: empty prompts, ids outside the vocabulary, values out of range.
        ContextLengthError: a prompt that leaves no room for a new token.
        CheckpointError: a string for a model without a tokenizer.
        RuntimeError: another generation used the cache meanwhile.
    """
    settings = model.generation_config.filled(config, overrides)
    ids, single = read_prompts(model, prompts)
    run = GenerationStream(model, ids, settings, cache)
    if stream:
        return run
    with run:
        for _ in run:
            pass
    outputs = run.outputs()
    return outputs[0] if single else outputs


def chat(
    model: BitNetModel,
    messages: Any,
    config: GenerationConfig | None = None,
    *,
    stream: bool = False,
    cache: KVCache | None = None,
    **overrides: Any,
) -> GenerationOutput | GenerationStream:
    """Answer a conversation, [{"role": "user", "content": "..."}, ...], by the chat template.

    With one ``cache`` for a whole conversation, a turn runs only the ids from the first one on
    that the cache does not hold; an answer is encoded anew as part of the next prompt, and where
    that gives other ids than were generated, it runs again.

    Raises:
        CheckpointError: the model has no chat template (use generate), or no tokenizer.
        InvalidShapeError: messages of the wrong kind; as :func:`generate` otherwise.
    """
    ids = model.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    result = generate(model, ids, config, stream=stream, cache=cache, **overrides)
    assert not isinstance(result, list)
    return result


class GenerationStream(Iterator[GenerationChunk]):
    """The chunks of a generation as they come.

    ``close()`` ends it, from another thread too: then within one token, or one chunk of the
    prefill. It closes itself at the end of a ``with`` block.
    """

    def __init__(
        self,
        model: BitNetModel,
        prompts: list[list[int]],
        config: GenerationConfig,
        cache: KVCache | None,
    ) -> None:
        self._model = model
        self._config = config
        self._seed = None if config.greedy else _seed(config.seed)
        self._cache, limit = _room(model, prompts, config, cache)
        stops = set(config.stop_token_ids)
        if not config.ignore_eos:
            stops.update(model.config.eos_token_ids)
        self._stop_ids = [i for i in sorted(stops) if i < model.config.vocab_size]
        tokenizer = _tokenizer(model)
        if config.stop and tokenizer is None:
            raise InvalidShapeError("stop: found strings, but the model has no tokenizer")
        self._sequences = [
            Sequence(
                index,
                prompt,
                config,
                frozenset(stops),
                limit,
                None if tokenizer is None else tokenizer.stream_decoder(after=prompt),
            )
            for index, prompt in enumerate(prompts)
        ]
        vocab = model.config.vocab_size
        self._logits = np.empty((len(prompts), vocab), np.float32)
        self._sampler = Sampler(config, vocab, self._seed or 0)
        self._seen = [self._sampler.seen(prompt) for prompt in prompts]
        self._steps = self._device_steps()
        self._tokens = np.zeros(len(prompts), np.int32)  # chosen last, where there are steps
        self._prefilled = 0
        self._seconds = {"prefill": 0.0, "decode": 0.0}
        self._closed = False
        self._chunks = self._run()

    def __next__(self) -> GenerationChunk:
        return next(self._chunks)

    def __enter__(self) -> GenerationStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """End the generation; the iterator has no more chunks."""
        self._closed = True
        with suppress(ValueError):  # it runs in another thread, which will see the mark
            self._chunks.close()

    def outputs(self) -> list[GenerationOutput]:
        """The finished sequences, in the order of the prompts.

        Raises:
            RuntimeError: the stream is not at its end.
        """
        if any(s.finish_reason is None for s in self._sequences):
            raise RuntimeError("stream: found unfinished sequences, wanted it iterated to its end")
        new = sum(len(s.token_ids) for s in self._sequences)
        timings = Timings(
            self._prefilled,
            self._seconds["prefill"],
            max(new - len(self._sequences), 0),
            self._seconds["decode"],
        )
        return [s.output(timings, self._seed) for s in self._sequences]

    # --- the run ---------------------------------------------------------------------------

    def _run(self) -> Generator[GenerationChunk, None, None]:
        shared = self._share()
        phase = "prefill"
        try:
            start = perf_counter()
            for _ in self._prefill(shared):
                if self._closed:
                    self._cache.truncate(shared)
                    return
            if self._steps is not None:
                self._tokens = self._steps.first()
            chunks = self._choose(self._sequences)
            while True:
                self._seconds[phase] += perf_counter() - start
                yield from chunks
                phase, start = "decode", perf_counter()
                running = [s for s in self._sequences if s.finish_reason is None]
                if not running or self._closed:
                    return
                self._decode(running)
                chunks = self._choose(running)
        except GeneratorExit:  # closed between two chunks: what was told of stays in the cache
            raise
        except BaseException as error:
            if type(error) is not RuntimeError:  # else another call has the cache: not ours to cut
                self._cache.truncate(shared)
            raise

    def _share(self) -> list[int]:
        """Cut the cache to what it shares with the prompts; one token at least is left to run."""
        shared = [
            min(_common(held, s.prompt), len(s.prompt) - 1)
            for held, s in zip(self._cache.tokens, self._sequences, strict=True)
        ]
        self._cache.truncate(shared)
        return shared

    def _prefill(self, shared: list[int]) -> Iterator[None]:
        """Run what the cache lacks, PREFILL_CHUNK tokens at a time; logits of the last ones."""
        done = list(shared)
        waiting = [s.index for s in self._sequences]
        step = np.empty_like(self._logits) if self._model.device == "cpu" else None
        while waiting:
            counts = [0] * len(done)
            room = PREFILL_CHUNK
            for index in waiting:
                counts[index] = min(len(self._sequences[index].prompt) - done[index], room)
                room -= counts[index]
            ids = np.zeros((len(done), max(counts)), np.int64)
            for index, count in enumerate(counts):
                part = self._sequences[index].prompt[done[index] : done[index] + count]
                ids[index, :count] = part
                done[index] += count
            logits = self._model.prefill(ids, self._cache, lengths=counts, out=step)
            self._prefilled += sum(counts)
            ended = [i for i in waiting if done[i] == len(self._sequences[i].prompt)]
            if self._steps is not None:
                self._steps.keep(ended, logits)
            else:
                host = step if step is not None else host_logits(self._model, logits)
                self._logits[ended] = host[ended]
            waiting = [i for i in waiting if i not in ended]
            yield

    def _decode(self, running: list[Sequence]) -> None:
        ids = np.zeros(len(self._sequences), np.int32)
        active = np.zeros(len(self._sequences), np.bool_)
        for sequence in running:
            if len(self._cache.tokens[sequence.index]) != sequence.length - 1:
                raise RuntimeError(
                    "cache: in use by another generation, which changed it; wanted one of its own"
                )
            ids[sequence.index] = sequence.token_ids[-1]
            active[sequence.index] = True
        if self._steps is not None:
            self._tokens = self._steps.next(active, ids)
            return
        if self._model.device != "cpu":
            logits = self._model.decode(ids, self._cache, active=active)
            self._logits[active] = host_logits(self._model, logits)[active]
            return
        count = self._sampler.candidates
        if not count or self._config.logprobs is not None:
            self._model.decode(ids, self._cache, active=active, out=self._logits)
            return
        self._model.decode_largest(
            ids,
            self._cache,
            count,
            keep=[self._adjusted(s) for s in self._sequences],
            active=active,
            out=self._logits,
        )

    def _adjusted(self, sequence: Sequence) -> npt.NDArray[np.int32]:
        """The ids whose logits are changed before the next choice."""
        ids = np.flatnonzero(self._seen[sequence.index])
        if not sequence.may_stop:
            ids = np.concatenate([ids, np.array(self._stop_ids, np.int64)])
        return ids.astype(np.int32)

    def _choose(self, running: list[Sequence]) -> list[GenerationChunk]:
        """Take the next token of each sequence from its row of logits."""
        chunks = []
        for sequence in running:
            row: npt.NDArray[np.float32] = self._logits[sequence.index]
            token = self._token(sequence, row)
            chunk = sequence.push(token)
            if self._config.logprobs is not None and len(sequence.token_ids) > len(
                sequence.logprobs
            ):
                sequence.logprobs.append(token_logprobs(row, token, self._config.logprobs))
            if chunk is not None:
                chunks.append(chunk)
        return chunks

    def _token(self, sequence: Sequence, row: npt.NDArray[np.float32]) -> int:
        """The next token of a sequence, from its logits or as the device chose it."""
        if self._steps is not None:
            return self._sampler.checked(int(self._tokens[sequence.index]), sequence.length)
        scored = row
        if not sequence.may_stop and self._stop_ids:
            scored = row if self._config.logprobs is None else row.copy()
            scored[self._stop_ids] = -np.inf
        return self._sampler.choose(scored, self._seen[sequence.index], sequence.length)

    def _device_steps(self) -> DeviceSteps | None:
        """Steps by which the model's device chooses; None where logits have to come to the host."""
        config = self._config
        suppresses = config.min_new_tokens > 0 and len(self._stop_ids) > 0
        if self._model.device == "cpu" or config.logprobs is not None or suppresses:
            return None
        return DeviceSteps(
            *(self._model, self._cache, config, self._seed or 0, self._seen),
            self._sampler.candidates,
        )


def _tokenizer(model: BitNetModel) -> Tokenizer | None:
    """The model's tokenizer; ids can be generated without one, or with one of unknown kind."""
    try:
        return model.tokenizer if model.has_tokenizer else None
    except UnsupportedModelError:
        return None


def _room(
    model: BitNetModel,
    prompts: list[list[int]],
    config: GenerationConfig,
    cache: KVCache | None,
) -> tuple[KVCache, int]:
    """The cache to use, and how many tokens a sequence may have, prompt included.

    Raises:
        ContextLengthError, InvalidShapeError: prompts or cache that do not fit.
    """
    limit = model.config.max_position_embeddings
    what = "the model's context"
    if cache is not None:
        if cache.batch_size != len(prompts):
            raise InvalidShapeError(
                f"cache: found {cache.batch_size} sequences, wanted {len(prompts)}, one a prompt"
            )
        if cache.max_seq_len < limit:
            limit, what = cache.max_seq_len, "the cache's max_seq_len"
    longest = max(map(len, prompts))
    if longest >= limit:
        raise ContextLengthError(
            f"prompt: found {longest} tokens, {what} is {limit}, and one new token must fit"
        )
    if cache is None:
        cache = model.new_cache(len(prompts), min(limit, longest + config.max_new_tokens))
    return cache, limit


def _seed(given: int | None) -> int:
    return secrets.randbits(64) if given is None else given


def _common(held: list[int], prompt: list[int]) -> int:
    """How many tokens both begin with."""
    for i, (a, b) in enumerate(zip(held, prompt, strict=False)):
        if a != b:
            return i
    return min(len(held), len(prompt))
