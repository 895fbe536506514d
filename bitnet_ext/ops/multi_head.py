"""Multi-head attention with its projections, caches and chunking."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.ops.attention import attention
from bitnet_ext.ops.multi_head_backward import Call, MultiHeadGradients, gradients
from bitnet_ext.ops.multi_head_parts import (
    Array,
    Cache,
    Float32,
    Keys,
    Projections,
    Tables,
    draw_seeds,
    flat,
    join,
    mask_parts,
)

__all__ = ["MultiHeadAttention", "MultiHeadGradients"]


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
        self._weights: Projections | None = None
        self._cache: Cache | None = None
        self._trained: Call | None = None

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
        self._weights = Projections(found)
        self._trained = None

    def state_dict(self) -> dict[str, Float32]:
        """Copies of the weights, as :meth:`load_state_dict` takes them."""
        weights = self._weights.state if self._weights else {}
        return {name: weight.copy() for name, weight in weights.items()}

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
            training: apply dropout, and remember the inputs for :meth:`backward`.
            seed: of the dropout, sequence b of the flattened batch takes ``seed + b``; default a
                fresh one.

        Returns:
            ``[batch..., S, out_dim]`` in the dtype of x.

        Raises:
            InvalidShapeError: shapes or options that do not fit; no weights, no cache.
        """
        query = self._input("x", x)
        batch, rows = query.shape[:-2], flat(query)
        kv = None if x_kv is None or use_cached_kv else self._input("x_kv", x_kv, batch)
        source = rows if kv is None else flat(kv)
        modes = (cache_kv, use_cached_kv, append_kv, only_cache_first_head_kv)
        weights = self._check_modes(*modes, add_input, save_peak_mem_factor)
        past = self.cache_length if append_kv else 0
        heads = 1 if reuse_first_head_kv else self.kv_heads
        keys = Keys(weights, source, rope, past, heads)
        cache = self._next_cache(keys, len(rows), *modes)
        call = Call(
            weights=weights,
            batch=batch,
            rows=rows,
            keys=None if use_cached_kv else keys,
            attended=cache if cache is not None and not cache_kv else keys,
            causal=causal,
            past=past,
            pattern=mask_parts(mask, batch, rows.shape[1]),
            rope=rope,
            scale=self.softmax_scale,
            dropout_p=self.dropout_p if training else 0.0,
            seeds=draw_seeds(seed, len(rows)) if training and self.dropout_p else None,
            add_input=add_input,
            factor=save_peak_mem_factor,
            dtype=np.asarray(x).dtype,
            kv_dtype=None if kv is None else np.asarray(x_kv).dtype,
        )
        out = np.empty((*rows.shape[:2], self.out_dim), np.float32)
        for part, spans in call.parts():
            k, v = call.attended.read(part)
            for span in spans:
                attended = attention(call.queries(part, span), k, v, **call.options(part, span))
                out[part, span] = weights.project("w_out", join(attended))
                if add_input:
                    out[part, span] += rows[part, span]
        if cache_kv or append_kv:
            self._cache = cache
        if training:
            self._trained = call
        return out.reshape(*batch, *out.shape[1:]).astype(call.dtype, copy=False)

    def backward(self, d_out: npt.ArrayLike) -> MultiHeadGradients:
        """Gradients of the last call with ``training=True``.

        That call kept its inputs alone: projections and attention are computed again, in the parts
        of its ``save_peak_mem_factor``, with the same dropout. The bits are the same for every
        factor and number of threads. Inputs must not have been written to since. Keys that were in
        the cache before the call are constants.

        Args:
            d_out: gradient of the call's result; float32 or float16 ``[batch..., S, out_dim]``.

        Returns:
            ``x`` and ``x_kv`` (None where the call had none), in the shapes and dtypes of the
            call's, and ``weights``, float32 by the names of :meth:`load_state_dict`.

        Raises:
            InvalidShapeError: no such call since the weights were loaded; another shape.
        """
        call = self._trained
        if call is None:
            raise InvalidShapeError("backward: found no call with training=True, wanted one")
        gradient = np.asarray(d_out)
        wanted = (*call.batch, call.rows.shape[1], self.out_dim)
        if gradient.shape != wanted or gradient.dtype not in (np.float32, np.float16):
            raise InvalidShapeError(
                f"d_out: found {gradient.dtype} {gradient.shape}, wanted float32 or float16 "
                f"{wanted}"
            )
        return gradients(call, flat(gradient.astype(np.float32, copy=False)))

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
    ) -> Projections:
        if self._weights is None:
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
        return self._weights

    def _next_cache(
        self,
        keys: Keys,
        batch: int,
        cache_kv: bool,
        use_cached_kv: bool,
        append_kv: bool,
        only_first: bool,
    ) -> Cache | None:
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
            return Cache.of(k[:, :, heads], v[:, :, heads])
        return Cache.of(k, v) if held is None else held.extended(k, v)
