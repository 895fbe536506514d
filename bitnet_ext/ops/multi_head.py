"""Multi-head attention with its projections, caches and chunking."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.device import Device, device_of
from bitnet_ext.gpu.interchange import kind_of
from bitnet_ext.ops.multi_head_backward import Call, MultiHeadGradients, gradients
from bitnet_ext.ops.multi_head_dispatch import by_way_of
from bitnet_ext.ops.multi_head_parts import (
    Cache,
    Keys,
    Projections,
    check_modes,
    draw_seeds,
    mask_parts,
    rope_tables,
)
from bitnet_ext.ops.multi_head_place import (
    Array,
    Float32,
    Place,
    array_here,
    brought,
    contiguous_copy,
    flat,
    key_of,
    matrices,
    place_name,
    place_of,
)

__all__ = ["MultiHeadAttention", "MultiHeadGradients"]


class MultiHeadAttention:
    """Attention heads between an input and an output projection (arXiv:1706.03762).

    ``q, k, v = x w_q, x_kv w_k, x_kv w_v`` by heads, then :func:`~bitnet_ext.attention`, then
    ``w_out``; no biases. The rows of a result have the same bits in every batch and chunk.

    A call works where x is: on the host, or on a CUDA device, with every bit the host's. Arrays may
    be of NumPy, CuPy or another library with DLPack; the result is of x's.
    The first call on a device brings the weights there, where they stay; keys and values stay in
    the cache where they were made.

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
        # By where they are; the first is what was loaded.
        self._weights: dict[int | None, Projections] = {}
        self._cache: Cache | None = None
        self._cache_device: Device | None = None
        self._trained: tuple[Device | None, Call] | None = None

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
        w_out [H, d_v, E_out]; all of the host, or all of the current CUDA device.

        Raises:
            InvalidShapeError: a name missing or unknown, or another shape.
        """
        shapes = self._shapes()
        if state.keys() != shapes.keys():
            raise InvalidShapeError(f"state: found {sorted(state)}, wanted {sorted(shapes)}")
        places = {name: device_of(state[name]) for name in shapes}
        device = places["w_q"]
        if any(place is not device for place in places.values()):
            raise InvalidShapeError("state: found some on the host, some on a CUDA device")
        found = {}
        with place_of(device, keep=False) as place:
            for name, shape in shapes.items():
                array = place.adopt(name, state[name])
                if array.shape != shape:
                    raise InvalidShapeError(f"{name}: found {array.shape}, wanted {shape}")
                found[name] = contiguous_copy(place, array)
            self._weights = {key_of(device): Projections(place, found)}
        self._trained = None

    def state_dict(self) -> dict[str, Float32]:
        """Copies of the weights, as :meth:`load_state_dict` takes them; of a device's, as CuPy's
        arrays."""
        if not self._weights:
            return {}
        weights = next(iter(self._weights.values()))
        return {name: weight.copy() for name, weight in weights.state.items()}

    def _weights_on(self, place: Place) -> Projections:
        """The weights where a call works, brought there once."""
        if not self._weights:
            raise InvalidShapeError("state: found no weights, wanted those of load_state_dict")
        key = key_of(place.device)
        if key not in self._weights:
            loaded = next(iter(self._weights.values()))
            state = {name: brought(weight, place) for name, weight in loaded.state.items()}
            self._weights[key] = Projections(place, state)
        return self._weights[key]

    @property
    def _unsent_bytes(self) -> int:
        """Of the weights, where no device has them yet."""
        if any(place is not None for place in self._weights):
            return 0
        return 4 * sum(math.prod(shape) for shape in self._shapes().values())

    # --- the cache -----------------------------------------------------------------------------

    @property
    def cache_length(self) -> int:
        """Keys in the cache."""
        return self._cache.length if self._cache else 0

    def clear_cache(self) -> None:
        """Forget the cached keys and values."""
        self._cache = self._cache_device = None

    # --- the call ------------------------------------------------------------------------------

    def __call__(
        self,
        x: npt.ArrayLike,
        x_kv: npt.ArrayLike | None = None,
        *,
        causal: bool = False,
        mask: npt.ArrayLike | None = None,
        rope: tuple[npt.ArrayLike, npt.ArrayLike] | None = None,
        cache_kv: bool = False,
        use_cached_kv: bool = False,
        append_kv: bool = False,
        reuse_first_head_kv: bool = False,
        only_cache_first_head_kv: bool = False,
        add_input: bool = False,
        save_peak_mem_factor: int | None = None,
        training: bool = False,
        seed: int | None = None,
        out: Array | None = None,
        device: str = "auto",
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
            reuse_first_head_kv: every query head attends to the first kv head, the cache's too.
            only_cache_first_head_kv: cache that head alone; later calls attend to it with every
                query head.
            add_input: add x to the result.
            save_peak_mem_factor: f: work on ceil(B / f) sequences of the flattened batch at a
                time, or on ceil(S / f) queries where there is one; the bits stay. Default: all at
                once, on a CUDA device as many as its memory has room for.
            training: apply dropout, and remember the inputs for :meth:`backward`.
            seed: of the dropout, sequence b of the flattened batch takes ``seed + b``; default a
                fresh one.
            out: contiguous array for the result, where x is and in its dtype. On a CUDA device such
                calls, but not those in training, keep their intermediates for the next: when all
                arguments are there, a call like the one before allocates and copies nothing.
            device: where arrays of the host are worked on: "cpu", "cuda" (copied there and back),
                or "auto": on a device that is there, if that is faster by ``gpu/dispatch.py``'s
                table. Calls with a cache, ``out`` or training stay where x is.

        Returns:
            ``[batch..., S, out_dim]`` in the dtype of x; ``out`` where it was given.

        Raises:
            InvalidShapeError: shapes or options that do not fit; no weights, no cache.
            DeviceUnavailableError: ``device`` is not there.
        """
        here, as_given = device_of(x), kind_of("x", x)
        modes = (cache_kv, use_cached_kv, append_kv, only_cache_first_head_kv)
        if here is None and device != "cpu":
            keeps = any(modes) or training or out is not None
            options = {
                "causal": causal,
                "mask": mask,
                "rope": rope,
                "reuse_first_head_kv": reuse_first_head_kv,
                "add_input": add_input,
                "save_peak_mem_factor": save_peak_mem_factor,
            }
            if (result := by_way_of(device, self, x, x_kv, keeps, options)) is not None:
                return as_given(result)
        with place_of(here, keep=out is not None and not training) as place:
            query = self._input(place, "x", x)
            result = self._result(place, query, out)
            batch, rows = query.shape[:-2], matrices(place, "x", query)
            source, kv_dtype = rows, None
            if x_kv is not None and not use_cached_kv:
                given = self._input(place, "x_kv", x_kv, batch)
                source, kv_dtype = matrices(place, "x_kv", given), given.dtype
            check_modes(*modes, save_peak_mem_factor)
            if add_input and self.out_dim != self.embed_dim:
                raise InvalidShapeError(
                    f"add_input: found out_dim {self.out_dim}, wanted embed_dim {self.embed_dim}"
                )
            held = self._held_cache(here, len(rows), use_cached_kv, append_kv)
            past = held.length if held is not None and append_kv else 0
            positions = past + max(rows.shape[1], 0 if use_cached_kv else source.shape[1])
            angles = None if rope is None else rope_tables(place, rope, positions, self.d_k)
            weights = self._weights_on(place)
            keys = Keys(weights, source, angles, past, 1 if reuse_first_head_kv else self.kv_heads)
            cache = self._next_cache(place, keys, held, *modes)
            call = Call(
                weights=weights,
                batch=batch,
                rows=rows,
                keys=None if use_cached_kv else keys,
                attended=cache if cache is not None and not cache_kv else keys,
                causal=causal,
                past=past,
                pattern=mask_parts(place, mask, batch, rows.shape[1]),
                rope=angles,
                scale=self.softmax_scale,
                dropout_p=self.dropout_p if training else 0.0,
                seeds=draw_seeds(seed, len(rows)) if training and self.dropout_p else None,
                add_input=add_input,
                factor=save_peak_mem_factor,
                dtype=query.dtype,
                kv_dtype=kv_dtype,
            )
            to = flat(result)
            exact = to if to.dtype == np.float32 else place.take("out", to.shape)
            call.forward(place, exact)
            if exact is not to:
                to[...] = exact
        if cache_kv or append_kv:
            self._cache, self._cache_device = cache, here
        if training:
            self._trained = here, call
        return as_given(result) if out is None else out

    def backward(self, d_out: npt.ArrayLike) -> MultiHeadGradients:
        """Gradients of the last call with ``training=True``.

        That call kept its inputs alone: projections and attention are computed again, in the parts
        of its ``save_peak_mem_factor``, with the same dropout. The bits are the same for every
        factor and number of threads. Inputs must not have been written to since. Keys that were in
        the cache before the call are constants.

        Args:
            d_out: gradient of the call's result; float32 or float16 ``[batch..., S, out_dim]``,
                where that is.

        Returns:
            ``x`` and ``x_kv`` (None where the call had none), in the shapes and dtypes of the
            call's, and ``weights``, float32 by the names of :meth:`load_state_dict`.

        Raises:
            InvalidShapeError: no such call since the weights were loaded; another shape.
        """
        if self._trained is None:
            raise InvalidShapeError("backward: found no call with training=True, wanted one")
        as_given = kind_of("d_out", d_out)
        device, call = self._trained
        with place_of(device, keep=False) as place:
            gradient = array_here("d_out", d_out, place)
            wanted = (*call.batch, call.rows.shape[1], self.out_dim)
            if gradient.shape != wanted or gradient.dtype not in (np.float32, np.float16):
                raise InvalidShapeError(
                    f"d_out: found {gradient.dtype} {gradient.shape}, wanted float32 or float16 "
                    f"{wanted}"
                )
            found = gradients(place, call, matrices(place, "d_out", gradient))
        return MultiHeadGradients(
            as_given(found.x),
            None if found.x_kv is None else as_given(found.x_kv),
            {name: as_given(weight) for name, weight in found.weights.items()},
        )

    def _result(self, place: Place, x: Array, out: Array | None) -> Array:
        """``out``, checked, or an array for the result."""
        shape = (*x.shape[:-1], self.out_dim)
        if out is None:
            return place.empty(shape, x.dtype)
        found = array_here("out", out, place)
        usable = found.flags.c_contiguous and getattr(found.flags, "writeable", True)
        if found.shape != shape or found.dtype != x.dtype or not usable:
            raise InvalidShapeError(
                f"out: found {found.dtype} {found.shape}, wanted contiguous {x.dtype} {shape}, "
                "not read-only"
            )
        return found

    def _input(
        self, place: Place, name: str, value: npt.ArrayLike, batch: tuple[int, ...] | None = None
    ) -> Array:
        array = array_here(name, value, place)
        fits = array.ndim >= 2 and array.shape[-1] == self.embed_dim
        if not fits or array.dtype not in (np.float32, np.float16):
            raise InvalidShapeError(
                f"{name}: found {array.dtype} {array.shape}, wanted float32 or float16 "
                f"[batch..., S, {self.embed_dim}]"
            )
        if batch is not None and array.shape[:-2] != batch:
            raise InvalidShapeError(f"{name}: found {array.shape}, wanted the batch of x, {batch}")
        return array

    def _held_cache(
        self, device: Device | None, batch: int, use_cached_kv: bool, append_kv: bool
    ) -> Cache | None:
        """The cache that the call goes on with."""
        held = self._cache
        if not use_cached_kv and not append_kv:
            return None
        if held is None:
            if use_cached_kv:
                raise InvalidShapeError(f"cache: found none, wanted one of {batch} sequences")
            return None
        if self._cache_device is not device:
            found, wanted = place_name(self._cache_device), place_name(device)
            raise InvalidShapeError(f"cache: found it on {found}, wanted it on {wanted}, as x is")
        if len(held.keys) != batch:
            raise InvalidShapeError(
                f"cache: found one of {len(held.keys)} sequences, wanted one of {batch} sequences"
            )
        return held

    def _next_cache(
        self,
        place: Place,
        keys: Keys,
        held: Cache | None,
        cache_kv: bool,
        use_cached_kv: bool,
        append_kv: bool,
        only_first: bool,
    ) -> Cache | None:
        """The cache that the call attends to or leaves behind; None: neither."""
        if held is not None and use_cached_kv:
            return held.first_heads(keys.heads)
        if not cache_kv and not append_kv:
            return None
        k, v = (a.swapaxes(1, 2) for a in keys.hold(place))
        if cache_kv:
            heads = slice(1 if only_first else None)
            return Cache.of(place, k[:, :, heads], v[:, :, heads])
        return Cache.of(place, k, v) if held is None else held.extended(place, k, v)
