"""Multi-head attention with its projections, caches and chunking."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.ops.attention import attention
from bitnet_ext.ops.rowwise import rotary_embedding

__all__ = ["MultiHeadAttention"]

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]
Tables = tuple[npt.ArrayLike, npt.ArrayLike]


class MultiHeadAttention:
    """Attention heads between an input and an output projection (arXiv:1706.03762).

    ``q, k, v = x w_q, x_kv w_k, x_kv w_v`` by heads, then :func:`~bitnet_ext.attention`, then
    ``w_out``; no biases. The rows of a result have the same bits in every batch and chunk.

    Args:
        embed_dim: E, the width of the inputs.
        num_heads: H query heads.
        d_k, d_v: widths of a head's keys and values; default ``embed_dim // num_heads`` and d_k.
        kv_heads: Hkv, a divisor of H; kv head j serves query heads j * H / Hkv and on.
        out_dim: width of the result; default E.
        dropout_p: part of the attention weights dropped in training.
        softmax_scale: of the dot products; default 1 / sqrt(d_k).

    Raises:
        InvalidShapeError: sizes that do not fit.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        d_k: int | None = None,
        d_v: int | None = None,
        kv_heads: int | None = None,
        out_dim: int | None = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
    ) -> None:
        if num_heads < 1 or (d_k is None and embed_dim % num_heads):
            raise InvalidShapeError(
                f"num_heads: found {num_heads}, wanted a divisor of embed_dim {embed_dim}, or d_k"
            )
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.d_k = embed_dim // num_heads if d_k is None else d_k
        self.d_v = self.d_k if d_v is None else d_v
        self.kv_heads = num_heads if kv_heads is None else kv_heads
        self.out_dim = embed_dim if out_dim is None else out_dim
        self.dropout_p, self.softmax_scale = dropout_p, softmax_scale
        if min(embed_dim, num_heads, self.d_k, self.d_v, self.kv_heads, self.out_dim) < 1:
            raise InvalidShapeError("sizes: found one below 1, wanted positive integers")
        if num_heads % self.kv_heads:
            raise InvalidShapeError(
                f"kv_heads: found {self.kv_heads}, wanted a divisor of {num_heads}"
            )
        self._state: dict[str, Float32] = {}
        self._tables: dict[str, Float32] = {}
        self._cache: _Cache | None = None

    # --- weights -------------------------------------------------------------------------------

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "w_q": (self.num_heads, self.d_k, self.embed_dim),
            "w_k": (self.kv_heads, self.d_k, self.embed_dim),
            "w_v": (self.kv_heads, self.d_v, self.embed_dim),
            "w_out": (self.num_heads, self.d_v, self.out_dim),
        }

    def load_state_dict(self, state: Mapping[str, npt.ArrayLike]) -> None:
        """Take copies of the weights: w_q [H, d_k, E], w_k [Hkv, d_k, E], w_v [Hkv, d_v, E],
        w_out [H, d_v, E_out].

        Raises:
            InvalidShapeError: a name missing or unknown, or another shape.
        """
        shapes = self._shapes()
        if state.keys() != shapes.keys():
            raise InvalidShapeError(f"state: found {sorted(state)}, wanted {sorted(shapes)}")
        found = {name: np.array(state[name], np.float32, order="C") for name in shapes}
        for name, shape in shapes.items():
            if found[name].shape != shape:
                raise InvalidShapeError(f"{name}: found {found[name].shape}, wanted {shape}")
        self._state = found
        # As the projection reads them: a row for each output.
        self._tables = {n: w.reshape(-1, self.embed_dim) for n, w in found.items() if n != "w_out"}
        self._tables["w_out"] = np.ascontiguousarray(found["w_out"].reshape(-1, self.out_dim).T)

    def state_dict(self) -> dict[str, Float32]:
        """Copies of the weights, as :meth:`load_state_dict` takes them."""
        return {name: weight.copy() for name, weight in self._state.items()}

    # --- the cache -----------------------------------------------------------------------------

    @property
    def cache_length(self) -> int:
        """Keys in the cache."""
        return self._cache.length if self._cache else 0

    def clear_cache(self) -> None:
        """Forget the cached keys and values."""
        self._cache = None

    # --- the call ------------------------------------------------------------------------------

    def __call__(
        self,
        x: npt.ArrayLike,
        x_kv: npt.ArrayLike | None = None,
        *,
        causal: bool = False,
        mask: npt.ArrayLike | None = None,
        rope: Tables | None = None,
        cache_kv: bool = False,
        use_cached_kv: bool = False,
        append_kv: bool = False,
        reuse_first_head_kv: bool = False,
        only_cache_first_head_kv: bool = False,
        add_input: bool = False,
        save_peak_mem_factor: int | None = None,
        training: bool = False,
        seed: int | None = None,
    ) -> Array:
        """Attend from ``x`` to ``x_kv`` (or ``x``), or to the cache.

        Args:
            x: float32 or float16 ``[batch..., S, E]``.
            x_kv: ``[batch..., T, E]``; default ``x``.
            causal: query i sees key j when j <= i, counted from the first appended key with
                ``append_kv``.
            mask: as :func:`~bitnet_ext.attention` takes it, for ``[batch..., H, S, T]``.
            rope: (cos, sin), each [positions, n]: turns the first 2n elements of q and k. Positions
                count from 0, with ``append_kv`` from the cache's length.
            cache_kv: replace the cache by the keys and values of this call.
            use_cached_kv: attend to the cache; ``x_kv`` takes no part.
            append_kv: add this call's keys and values to the cache and attend to all of it.
            reuse_first_head_kv: every query head attends to the first kv head.
            only_cache_first_head_kv: cache that head alone; later calls attend to it with every
                query head.
            add_input: add x to the result.
            save_peak_mem_factor: f: work on ceil(B / f) sequences of the flattened batch at a
                time, or on ceil(S / f) queries where there is one; the bits stay.
            training: apply dropout.
            seed: of the dropout, sequence b of the flattened batch takes ``seed + b``; default a
                fresh one.

        Returns:
            ``[batch..., S, out_dim]`` in the dtype of x.

        Raises:
            InvalidShapeError: shapes or options that do not fit; no weights, no cache.
        """
        query = self._input("x", x)
        batch, rows = query.shape[:-2], _flat(query)
        source = query if x_kv is None or use_cached_kv else self._input("x_kv", x_kv, batch)
        modes = (cache_kv, use_cached_kv, append_kv, only_cache_first_head_kv)
        self._check_modes(*modes, add_input, save_peak_mem_factor)
        past = self.cache_length if append_kv else 0
        keys = _Keys(self, _flat(source), rope, past, reuse_first_head_kv)
        cache = self._next_cache(keys, len(rows), *modes)
        attended = cache if cache is not None and not cache_kv else keys
        seeds = _seeds(seed, len(rows)) if training and self.dropout_p else None
        pattern = _mask_parts(mask, batch, rows.shape[1])
        out = np.empty((*rows.shape[:2], self.out_dim), np.float32)
        for part, spans in _parts(rows.shape[0], rows.shape[1], save_peak_mem_factor):
            k, v = attended.read(part)
            for span in spans:
                heads = attention(
                    self._heads("w_q", rows[part, span], self.num_heads, rope, past + span.start),
                    k,
                    v,
                    causal=causal,
                    past_len=past + span.start,
                    mask=pattern(part, span),
                    scale=self.softmax_scale,
                    dropout_p=0.0 if seeds is None else self.dropout_p,
                    seed=None if seeds is None else seeds[part],
                )
                joined = np.ascontiguousarray(heads.swapaxes(1, 2))
                out[part, span] = self._project("w_out", joined.reshape(*joined.shape[:2], -1))
                if add_input:
                    out[part, span] += rows[part, span]
        if cache_kv or append_kv:
            self._cache = cache
        return out.reshape(*batch, *out.shape[1:]).astype(np.asarray(x).dtype, copy=False)

    def _input(
        self, name: str, value: npt.ArrayLike, batch: tuple[int, ...] | None = None
    ) -> Float32:
        array = np.asarray(value)
        fits = array.ndim >= 2 and array.shape[-1] == self.embed_dim
        if not fits or array.dtype not in (np.float32, np.float16):
            raise InvalidShapeError(
                f"{name}: found {array.dtype} {array.shape}, wanted float32 or float16 "
                f"[batch..., S, {self.embed_dim}]"
            )
        if batch is not None and array.shape[:-2] != batch:
            raise InvalidShapeError(f"{name}: found {array.shape}, wanted the batch of x, {batch}")
        return array.astype(np.float32, copy=False)

    def _check_modes(
        self,
        cache_kv: bool,
        use_cached_kv: bool,
        append_kv: bool,
        only_first: bool,
        add_input: bool,
        factor: int | None,
    ) -> None:
        if not self._state:
            raise InvalidShapeError("state: found no weights, wanted those of load_state_dict")
        if cache_kv + use_cached_kv + append_kv > 1:
            raise InvalidShapeError(
                "cache_kv, use_cached_kv, append_kv: found more than one, wanted one or none"
            )
        if only_first and not cache_kv:
            raise InvalidShapeError("only_cache_first_head_kv: wanted together with cache_kv")
        if add_input and self.out_dim != self.embed_dim:
            raise InvalidShapeError(
                f"add_input: found out_dim {self.out_dim}, wanted embed_dim {self.embed_dim}"
            )
        if factor is not None and factor < 1:
            raise InvalidShapeError(f"save_peak_mem_factor: found {factor}, wanted 1 or more")

    def _next_cache(
        self,
        keys: _Keys,
        batch: int,
        cache_kv: bool,
        use_cached_kv: bool,
        append_kv: bool,
        only_first: bool,
    ) -> _Cache | None:
        """The cache that the call attends to or leaves behind; None: neither."""
        held = self._cache
        if (use_cached_kv and held is None) or (
            held is not None and (use_cached_kv or append_kv) and len(held.keys) != batch
        ):
            found = "none" if held is None else f"one of {len(held.keys)} sequences"
            raise InvalidShapeError(f"cache: found {found}, wanted one of {batch} sequences")
        if use_cached_kv:
            return held
        if not cache_kv and not append_kv:
            return None
        k, v = (a.swapaxes(1, 2) for a in keys.hold())
        if cache_kv:
            heads = slice(1 if only_first else None)
            return _Cache.of(k[:, :, heads], v[:, :, heads])
        return _Cache.of(k, v) if held is None else held.extended(k, v)

    def _project(self, name: str, x: Float32, outputs: int | None = None) -> Float32:
        """x [B, S, n] by the first ``outputs`` rows of a table -> [B, S, outputs]."""
        table = self._tables[name][:outputs]
        count = x.shape[0] * x.shape[1]
        y = np.empty((count, len(table)), np.float32)
        flat = np.ascontiguousarray(x).reshape(count, x.shape[2])
        _core.project(flat, table, "f32", None, None, y)
        return y.reshape(*x.shape[:2], len(table))

    def _heads(
        self, name: str, x: Float32, heads: int, rope: Tables | None = None, position: int = 0
    ) -> Float32:
        """Projected heads [B, heads, S, d] of x [B, S, E], turned by their positions."""
        width = self.d_v if name == "w_v" else self.d_k
        y = self._project(name, x, heads * width)
        if rope is not None:
            cos, sin = (np.asarray(table, np.float32) for table in rope)
            places = np.broadcast_to(np.arange(position, position + y.shape[1]), y.shape[:2])
            turned = 2 * cos.shape[-1]
            y = rotary_embedding(
                y, cos, sin, position_ids=places, rotary_dim=turned, num_heads=heads
            )
        return y.reshape(*y.shape[:2], heads, width).swapaxes(1, 2)


class _Keys:
    """Keys and values of one call, made when a part of the batch asks for them."""

    def __init__(
        self,
        module: MultiHeadAttention,
        source: Float32,
        rope: Tables | None,
        position: int,
        first_head: bool,
    ) -> None:
        self._module, self._source, self._rope, self._position = module, source, rope, position
        self._heads = 1 if first_head else module.kv_heads
        self._held: tuple[Float32, Float32] | None = None

    def read(self, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences."""
        if self._held is not None:
            return self._held[0][part], self._held[1][part]
        x, heads = self._source[part], self._heads
        k = self._module._heads("w_k", x, heads, self._rope, self._position)
        return k, self._module._heads("w_v", x, heads)

    def hold(self) -> tuple[Float32, Float32]:
        """Those of all sequences, kept for :meth:`read`."""
        self._held = self.read(slice(None))
        return self._held


class _Cache:
    """Keys and values [B, room, heads, d] of which the first ``length`` are filled."""

    def __init__(self, keys: Float32, values: Float32, length: int) -> None:
        self.keys, self.values, self.length = keys, values, length

    @classmethod
    def of(cls, keys: Float32, values: Float32) -> _Cache:
        return cls(keys.copy(), values.copy(), keys.shape[1])

    def extended(self, keys: Float32, values: Float32) -> _Cache:
        """One with more keys.  Room is shared with this one, whose own keys stay as they are."""
        if keys.shape[2] != self.keys.shape[2]:
            raise InvalidShapeError(
                f"cache: found {self.keys.shape[2]} kv heads, wanted {keys.shape[2]}"
            )
        length = self.length + keys.shape[1]
        room = self.keys.shape[1]
        if length > room:
            room = max(length, 2 * room)
            held = (self.keys, self.values)
            grown = [np.empty((a.shape[0], room, *a.shape[2:]), np.float32) for a in held]
            for new, old in zip(grown, held, strict=True):
                new[:, : self.length] = old[:, : self.length]
        else:
            grown = [self.keys, self.values]
        for new, added in zip(grown, (keys, values), strict=True):
            new[:, self.length : length] = added
        return _Cache(grown[0], grown[1], length)

    def read(self, part: slice) -> tuple[Float32, Float32]:
        """k [B, Hkv, T, d_k] and v of some sequences."""
        k, v = (a[part, : self.length].swapaxes(1, 2) for a in (self.keys, self.values))
        return k, v


def _flat(x: Float32) -> Float32:
    return x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])


def _parts(batch: int, rows: int, factor: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """Sequences to work on together, and their rows: all, or those of a memory factor."""
    inner = factor if batch == 1 else None
    for part in _slices(batch, factor):
        yield part, list(_slices(rows, inner))


def _slices(n: int, factor: int | None) -> Iterator[slice]:
    size = max(1, -(-n // (factor or 1)))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def _mask_parts(
    mask: npt.ArrayLike | None, batch: tuple[int, ...], rows: int
) -> Callable[[slice, slice], Array | None]:
    """The part of a mask of [batch..., H, S, T] for some sequences and rows."""
    if mask is None:
        return lambda part, span: None
    array = np.asarray(mask)
    one_row = array.ndim < 2 or array.shape[-2] == 1
    try:
        if array.ndim > 3:
            array = np.broadcast_to(array, batch + array.shape[-3:])
            array = array.reshape(math.prod(batch), *array.shape[-3:])
        if not one_row and array.shape[-2] != rows:
            raise ValueError
    except ValueError:
        raise InvalidShapeError(
            f"mask: found {array.shape}, wanted it to broadcast to {(*batch, 'H', rows, 'T')}"
        ) from None

    def cut(part: slice, span: slice) -> Array:
        chosen = array[part] if array.ndim > 3 else array
        return chosen if one_row else chosen[..., span, :]

    return cut


def _seeds(seed: int | None, batch: int) -> npt.NDArray[np.uint64]:
    first = secrets.randbits(64) if seed is None else seed
    return np.array([(first + b) % 2**64 for b in range(batch)], np.uint64)
