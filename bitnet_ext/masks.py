"""Causal attention masks as arrays: windows, prefixes, past keys, batches, a stream, a cache.

Query ``i`` of a call stands at position ``i + past``. It sees key ``j`` when ``j <= i + past`` and
``j >= i + past - left``, or when ``j < prefix``. The engine's own attention needs no mask array;
these are for other code.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.arguments import FAR, whole_number, window_extents
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dispatch
from bitnet_ext.gpu.device import device_of
from bitnet_ext.gpu.interchange import host_array, is_array, to_host

__all__ = ["MaskCache", "create_batch_causal_mask", "create_causal_mask", "iter_causal_mask"]

Array = npt.NDArray[Any]
Pattern = tuple[int, int, int, int, int]  # queries, keys, past, left, prefix; checked
Key = tuple[int | str | None, ...]

_DTYPES = frozenset(np.dtype(kind) for kind in (np.float32, np.float16, np.bool_))
_SPELLED = {dtype.name: dtype for dtype in _DTYPES}  # found at once


def create_causal_mask(
    q_len: int,
    k_len: int,
    past_len: Any = None,
    *,
    window: tuple[int, int] | None = None,
    prefix: int = 0,
    dtype: npt.DTypeLike = "float32",
    device: str = "cpu",
    out: Array | None = None,
) -> Array:
    """A causal mask ``[q_len, k_len]``.

    Args:
        q_len, k_len: queries and keys; zero is allowed. These, ``past_len`` and ``prefix`` stay
            below 2^40.
        past_len: keys before the first query, or a cache (its ``length``, the same in every
            sequence); default ``max(k_len - q_len, 0)``, unlike attention's top-left alignment.
        window: (left, right) keys seen around the diagonal, -1 unbounded. The mask is causal, so
            a right extent of 0 or more changes nothing.
        prefix: the first keys, which every query sees.
        dtype: float32 or float16 (0 where a query attends, else -inf), or bool (True: attend).
        device: "cpu", "cuda" for a CuPy array on the current device, or "auto": where ``out`` is,
            else "cuda" for a large mask (more than 16,384 elements) if there is a device.
        out: array of that shape and dtype to fill, of any library with DLPack; rows may lie any
            distance apart.

    Raises:
        InvalidShapeError: a negative or huge size, another dtype, an ``out`` that does not fit.
        DeviceUnavailableError: another device, or one that is not there.
    """
    pattern = _pattern(q_len, k_len, past_len, window, prefix)
    return _filled(_place(device, pattern[0] * pattern[1], out), pattern, _dtype(dtype), out)


def create_batch_causal_mask(
    q_lens: Sequence[int] | npt.NDArray[np.integer[Any]],
    k_lens: Sequence[int] | npt.NDArray[np.integer[Any]],
    past_len: Any = None,
    *,
    window: tuple[int, int] | None = None,
    prefix: int = 0,
    dtype: npt.DTypeLike = "float32",
    device: str = "cpu",
    out: Array | None = None,
) -> Array:
    """Masks of several sequences, ``[B, max(q_lens), max(k_lens)]``; padding is hidden.

    Args:
        q_lens, k_lens: queries and keys of each sequence.
        past_len: one number, one per sequence, or a cache of B sequences; default as in
            :func:`create_causal_mask`, for each sequence.
        window, prefix, dtype, device, out: as in :func:`create_causal_mask`.

    Raises:
        InvalidShapeError, DeviceUnavailableError: as :func:`create_causal_mask`.
    """
    queries, keys = _sizes("q_lens", q_lens), _sizes("k_lens", k_lens)
    if len(queries) != len(keys):
        raise InvalidShapeError(f"k_lens: found {len(keys)} lengths, wanted {len(queries)}")
    pasts = _pasts(past_len, queries, keys)
    left, prefix = window_extents(window)[0], whole_number("prefix", prefix, FAR)
    shape = (len(queries), max(queries, default=0), max(keys, default=0))
    place = _place(device, math.prod(shape), out)
    target: Array = place.target(shape, _dtype(dtype), out)
    for mask, q, k, past in zip(target, queries, keys, pasts, strict=True):
        place.fill(mask, q, k, past, left, prefix)
    return target if out is None else out


def iter_causal_mask(
    q_len: int,
    k_len: int,
    block: int = 128,
    past_len: Any = None,
    *,
    window: tuple[int, int] | None = None,
    prefix: int = 0,
    dtype: npt.DTypeLike = "float32",
    device: str = "cpu",
) -> Iterator[Array]:
    """The rows of :func:`create_causal_mask`, ``block`` at a time: ``[<= block, k_len]`` each.

    Each block is an array of its own, so memory stays constant when the caller lets go of it.

    Raises:
        InvalidShapeError, DeviceUnavailableError: as :func:`create_causal_mask`, at the call.
    """
    if whole_number("block", block) == 0:
        raise InvalidShapeError("block: found 0, wanted a positive integer")
    pattern, kind = _pattern(q_len, k_len, past_len, window, prefix), _dtype(dtype)
    queries, keys, past, left, first = pattern
    place = _place(device, min(queries, block) * keys, None)

    def blocks() -> Iterator[Array]:
        for low in range(0, queries, block):
            rows = min(block, queries - low)
            yield _filled(place, (rows, keys, past + low, left, first), kind)

    return blocks()


class MaskCache:
    """The most recently used masks, shared and, on the CPU, read-only; safe for several threads.

    A mask with a side longer than ``max_side``, or of more than ``max_bytes``, is made afresh each
    time. ``hits`` and ``misses`` count :meth:`get`.
    """

    def __init__(
        self, max_entries: int = 100, max_side: int = 2048, max_bytes: int = 256 << 20
    ) -> None:
        """Hold at most ``max_entries`` masks of at most ``max_side`` x ``max_side``, together at
        most ``max_bytes``; the least recently used make room."""
        self._max_entries = whole_number("max_entries", max_entries)
        self._max_side = whole_number("max_side", max_side)
        self._max_bytes = whole_number("max_bytes", max_bytes)
        self._masks: OrderedDict[Key, Array] = OrderedDict()
        self._nbytes = 0
        self._lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def get(
        self,
        q_len: int,
        k_len: int,
        past_len: Any = None,
        *,
        window: tuple[int, int] | None = None,
        prefix: int = 0,
        dtype: npt.DTypeLike = "float32",
        device: str = "cpu",
    ) -> Array:
        """The mask of :func:`create_causal_mask`, not to be changed; made on the first call.

        Raises:
            InvalidShapeError, DeviceUnavailableError: as :func:`create_causal_mask`.
        """
        if (  # for these _key's checks would take longer than all the rest of a hit
            type(q_len) is type(k_len) is type(prefix) is int
            and past_len is window is None
            and prefix == 0
            and device == "cpu"
            and type(dtype) is str
            and dtype in _SPELLED
        ):
            key: Key = (q_len, k_len, dtype)
        else:
            key = _key(q_len, k_len, past_len, window, prefix, dtype, device)
        with self._lock:
            found = self._masks.get(key)
            if found is not None:
                self._masks.move_to_end(key)
                self.hits += 1
                return found
        mask = create_causal_mask(
            q_len, k_len, past_len, window=window, prefix=prefix, dtype=dtype, device=device
        )
        return self._kept(key, _read_only(mask))

    def warm(self, sizes: Iterable[int | tuple[int, int]], **options: Any) -> None:
        """Make the masks of ``sizes``, each n (for n x n) or (q_len, k_len), ahead of use."""
        for size in sizes:
            q_len, k_len = (size, size) if isinstance(size, int) else size
            self.get(q_len, k_len, **options)

    def clear(self) -> None:
        """Forget every mask; the counts stay."""
        with self._lock:
            self._masks.clear()
            self._nbytes = 0

    def __len__(self) -> int:
        return len(self._masks)

    @property
    def hit_rate(self) -> float:
        """Hits as a part of all calls of :meth:`get`; 0 before the first."""
        calls = self.hits + self.misses
        return self.hits / calls if calls else 0.0

    @property
    def nbytes(self) -> int:
        """Bytes of the masks held."""
        return self._nbytes

    def _kept(self, key: Key, mask: Array) -> Array:
        """``mask`` counted as a miss and held, or the one that another thread held meanwhile."""
        with self._lock:
            self.misses += 1
            if max(mask.shape) > self._max_side or mask.nbytes > self._max_bytes:
                return mask
            if key in self._masks:
                return self._masks[key]
            self._masks[key] = mask
            self._nbytes += mask.nbytes
            while len(self._masks) > self._max_entries or self._nbytes > self._max_bytes:
                self._nbytes -= self._masks.popitem(last=False)[1].nbytes
        return mask


def _key(
    q_len: Any, k_len: Any, past_len: Any, window: Any, prefix: Any, dtype: Any, device: str
) -> Key:
    """What a cache finds a mask by: its sizes and dtype, and the rest where it is no default."""
    queries, keys, *rest = _pattern(q_len, k_len, past_len, window, prefix)
    size = queries, keys, _dtype(dtype).name
    where = _place(device, queries * keys, None).number
    plain = rest == [_past(None, queries, keys), -1, 0] and where is None
    return size if plain else (*size, *rest, where)


def _read_only(mask: Array) -> Array:
    """A view of a host's mask that cannot be made writeable again: its base is no array."""
    return np.asarray(mask.data.toreadonly()) if type(mask) is np.ndarray else mask


class _Host:
    """Masks in NumPy arrays."""

    number = None

    @staticmethod
    def target(shape: tuple[int, ...], kind: np.dtype[Any], out: Any) -> Array:
        if out is None:
            return np.empty(shape, kind)
        array = host_array("out", out) if is_array(out) else None
        if array is None or array.shape != shape or array.dtype != kind:
            found = type(out).__name__ if array is None else f"{array.dtype} {array.shape}"
            raise InvalidShapeError(f"out: found {found}, wanted {kind} {shape}")
        return array

    fill = staticmethod(_core.mask_fill)


def _pattern(q_len: Any, k_len: Any, past_len: Any, window: Any, prefix: Any) -> Pattern:
    q_len, k_len = whole_number("q_len", q_len, FAR), whole_number("k_len", k_len, FAR)
    past, left = _past(past_len, q_len, k_len), window_extents(window)[0]
    return q_len, k_len, past, left, whole_number("prefix", prefix, FAR)


def _filled(place: Any, pattern: Pattern, kind: np.dtype[Any], out: Any = None) -> Array:
    target: Array = place.target(pattern[:2], kind, out)
    place.fill(target, *pattern)
    return target if out is None else out


def _dtype(dtype: npt.DTypeLike) -> np.dtype[Any]:
    if isinstance(dtype, str) and dtype in _SPELLED:
        return _SPELLED[dtype]
    try:
        kind = np.dtype(dtype)
    except TypeError:
        pass
    else:
        if kind in _DTYPES:
            return kind
    raise InvalidShapeError(f"dtype: found {dtype!r}, wanted float32, float16 or bool")


def _sizes(name: str, values: Any) -> list[int]:
    array = to_host(name, values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise InvalidShapeError(f"{name}: found {values!r}, wanted a list of integers")
    return [whole_number(name, value, FAR) for value in array.tolist()]


def _past(past_len: Any, q_len: int, k_len: int) -> int:
    if past_len is None:
        return max(k_len - q_len, 0)
    lengths = _lengths(past_len)
    if isinstance(lengths, np.ndarray) and lengths.size:
        if (lengths != lengths.flat[0]).any():
            raise InvalidShapeError(
                f"past_len: found lengths {lengths.tolist()}, wanted one; use "
                "create_batch_causal_mask for sequences of different lengths"
            )
        lengths = lengths.flat[0]
    return whole_number("past_len", lengths, FAR)


def _lengths(past_len: Any) -> Any:
    """Those of a cache, or the value given; an array on the host."""
    lengths = getattr(past_len, "length", past_len)
    return to_host("past_len", lengths) if hasattr(lengths, "__dlpack__") else lengths


def _pasts(past_len: Any, queries: list[int], keys: list[int]) -> list[int]:
    lengths = _lengths(past_len)
    if lengths is None or np.ndim(lengths) == 0:
        return [_past(lengths, q, k) for q, k in zip(queries, keys, strict=True)]
    pasts = _sizes("past_len", lengths)
    if len(pasts) != len(queries):
        raise InvalidShapeError(f"past_len: found {len(pasts)} lengths, wanted {len(queries)}")
    return pasts


def _place(device: str, elements: int, out: Any) -> Any:
    """Where masks are made: ``target(shape, kind, out)``, ``fill`` as ``_core.mask_fill``, and the
    device's ``number``."""
    if device == "cpu":
        return _Host
    dispatch.check(device)
    if device == "auto":
        here = dispatch.mask_device(elements) if out is None else device_of(out) is not None
        if not here:
            return _Host
    from bitnet_ext.gpu.mask import DeviceMasks

    return DeviceMasks()
