"""Log-probabilities of given texts: all tokens at once, no [T, V] buffer, windows where too long.

What is conditioned on what:

- BOS: ``add_bos="auto"`` puts it in front of a text where the tokenizer does; ids stand as given.
  True puts it in front (unless it stands there), False never. BOS itself is never scored.
- Without BOS and context, nothing stands before the first token, and it is not scored.
- ``context`` is read before the input, and only what follows it is scored. Strings are encoded
  together, as they would stand in one text; a token across the border belongs to the input.
- An empty context says that every token shall be scored: BOS stands in front, or the end-of-text
  id of a model without BOS; with ``add_bos=False`` it is as no context.
- An empty input has no tokens: total 0, perplexity and bits per byte NaN.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.generate.prompts import read_ids
from bitnet_ext.gpu.interchange import is_array, to_host

if TYPE_CHECKING:
    from bitnet_ext.api import BitNetModel

__all__ = ["Score", "score"]

AddBos = bool | Literal["auto"]
BATCH_TOKENS = 4096  # rows of hidden states held at a time, or one window's


@dataclass(frozen=True, eq=False)
class Score:
    """How well a model predicts a text.

    Attributes:
        token_ids: int32 [N], the tokens that were scored.
        logprobs: float32 [N], natural log of each token's probability given all before it.
        is_greedy: bool [N], whether the token is the likeliest (lowest id on ties).
        num_bytes: UTF-8 bytes of the scored text, None for ids of a model without a tokenizer.
    """

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    is_greedy: npt.NDArray[np.bool_]
    num_bytes: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens scored."""
        return len(self.logprobs)

    @property
    def total(self) -> float:
        """Sum of the log-probabilities."""
        return float(self.logprobs.sum(dtype=np.float64))

    @property
    def perplexity(self) -> float:
        """exp(-mean log-probability); NaN without tokens."""
        if not self.num_tokens:
            return math.nan
        mean = self.total / self.num_tokens
        return math.exp(-mean) if -mean < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """-log2 of the text's probability a byte; NaN without bytes to count."""
        return -self.total / math.log(2) / self.num_bytes if self.num_bytes else math.nan


def score(
    model: BitNetModel,
    inputs: Any,
    context: Any = None,
    add_bos: AddBos = "auto",
    stride: int | None = None,
) -> Score | list[Score]:
    """Score a text, token ids, or a list of them (the rules are at the head of this module).

    Args:
        inputs: a string or ids (list, tuple, int array [T]); several: a list of them.
        context: a string or ids read before every input, or a list with one for each.
        add_bos: "auto", True or False.
        stride: tokens that the window moves on in a text longer than the model's context, 1 to
            context. Behind the first window, each token sees at least context - stride + 1 tokens
            before it. Default: the context, so that each token is run once.

    Returns:
        Score, or a list of them for a list of inputs.

    Raises:
        InvalidShapeError: inputs, context, ids or stride that make no sense.
        CheckpointError: a string for a model without a tokenizer.
    """
    window = model.config.max_position_embeddings
    step = window if stride is None else stride
    if not isinstance(step, int) or not 1 <= step <= window:
        raise InvalidShapeError(f"stride: found {stride!r}, wanted 1 to {window}")
    if add_bos not in (True, False, "auto"):
        raise InvalidShapeError(f"add_bos: found {add_bos!r}, wanted True, False or 'auto'")
    inputs = to_host("inputs", inputs) if is_array(inputs) else inputs
    context = to_host("context", context) if is_array(context) else context
    single = isinstance(inputs, str) or not _is_list(inputs)
    texts = [inputs] if single else list(inputs)
    contexts = list(context) if _is_list(context) else [context] * len(texts)
    if not texts or len(contexts) != len(texts):
        raise InvalidShapeError(
            f"inputs, context: found {len(texts)} and {len(contexts)}, wanted one or more of each"
        )
    spans = [
        _span(model, text, before, add_bos, "inputs" if single else f"inputs[{i}]")
        for i, (text, before) in enumerate(zip(texts, contexts, strict=True))
    ]
    scores = _score_spans(model, spans, window, step)
    return scores[0] if single else scores


def _is_list(value: Any) -> bool:
    """Whether ``value`` is a list of inputs rather than one."""
    if isinstance(value, np.ndarray):
        return value.ndim == 2
    nested = isinstance(value, list | tuple)
    return nested and any(isinstance(v, str | list | tuple) or is_array(v) for v in value)


@dataclass(frozen=True)
class _Span:
    """Ids of context and input; those from ``first`` on are scored, ``num_bytes`` of text."""

    ids: list[int]
    first: int
    num_bytes: int | None


def _span(model: BitNetModel, text: Any, context: Any, add_bos: AddBos, name: str) -> _Span:
    ids, first = _joined(model, text, context, name)
    bos = _bos(model)
    wanted = bool(add_bos)
    if add_bos == "auto":
        wanted = isinstance(text, str) and model.tokenizer.adds_bos
    if context is not None and first == 0 and add_bos is not False:
        wanted = True
        bos = bos if bos is not None else next(iter(model.config.eos_token_ids), None)
    if wanted and bos is None:
        raise InvalidShapeError(f"add_bos: found {add_bos!r}, but the model names no such token")
    if wanted and bos is not None and ids[:1] != [bos]:
        ids, first = [bos, *ids], first + 1
    elif ids[:1] == [bos]:
        first = max(first, 1)
    unscored = ids[first : max(first, 1)]  # a first token with nothing before it
    return _Span(ids, max(first, 1), _num_bytes(model, text, ids[first:], unscored))


def _joined(model: BitNetModel, text: Any, context: Any, name: str) -> tuple[list[int], int]:
    """Ids of context and input without BOS, and where the input begins."""
    if isinstance(text, str) and isinstance(context, str) and context:
        whole = model.tokenizer.encode(context + text, add_special_tokens=False)
        before = model.tokenizer.encode(context, add_special_tokens=False)
        same = (a == b for a, b in zip(whole, before, strict=False))
        return whole, next((i for i, equal in enumerate(same) if not equal), len(before))
    before = []
    if context is not None:
        before = read_ids(model, context, "context", add_special_tokens=False)
    return before + read_ids(model, text, name, add_special_tokens=False), len(before)


def _bos(model: BitNetModel) -> int | None:
    """The beginning-of-text id: the tokenizer's, else the configuration's."""
    found = model.tokenizer.bos_token_id if model.has_tokenizer else None
    return model.config.bos_token_id if found is None else found


def _num_bytes(model: BitNetModel, text: Any, scored: list[int], unscored: list[int]) -> int | None:
    if isinstance(text, str):
        return len(text.encode()) - len(model.tokenizer.decode(unscored).encode())
    if not model.has_tokenizer:
        return None
    return len(model.tokenizer.decode(scored[len(unscored) :]).encode())


@dataclass(frozen=True)
class _Window:
    """Tokens ``start`` to ``end`` of a span; those from ``first`` of the window on are scored."""

    span: int
    start: int
    end: int
    first: int


def _windows(spans: Sequence[_Span], context: int, stride: int) -> Iterator[_Window]:
    """Windows that score each token of each span once.

    Windows start at 0, stride, 2 stride, ...; each runs ``context`` tokens and so scores up to the
    token after them, beginning where the window before ended.
    """
    for index, span in enumerate(spans):
        at, start = span.first, 0
        while at < len(span.ids):
            end = min(len(span.ids), start + context + 1)
            if at < end:
                yield _Window(index, start, end, at - start)
                at = end
            start += stride


def _score_spans(
    model: BitNetModel, spans: Sequence[_Span], context: int, stride: int
) -> list[Score]:
    """Run the windows of all spans in batches of about BATCH_TOKENS tokens."""
    found: list[list[tuple[Any, Any]]] = [[] for _ in spans]
    batch: list[_Window] = []

    def run() -> None:
        ids = [spans[w.span].ids[w.start : w.end] for w in batch]
        for w, pair in zip(batch, model.token_logprobs(ids, [w.first for w in batch]), strict=True):
            found[w.span].append(pair)
        batch.clear()

    tokens = 0
    for piece in _windows(spans, context, stride):
        if batch and tokens + piece.end - piece.start > BATCH_TOKENS:
            run()
            tokens = 0
        batch.append(piece)
        tokens += piece.end - piece.start
    if batch:
        run()
    return [
        Score(
            np.array(span.ids[span.first :], np.int32),
            np.concatenate([np.empty(0, np.float32), *(pair[0] for pair in pairs)]),
            np.concatenate([np.empty(0, np.bool_), *(pair[1] for pair in pairs)]),
            span.num_bytes,
        )
        for span, pairs in zip(spans, found, strict=True)
    ]
