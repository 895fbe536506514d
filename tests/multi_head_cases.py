"""Modules with random weights and options for tests of MultiHeadAttention."""

import itertools

import numpy as np

import bitnet_ext as bx

B, S, T, E, H = 3, 11, 17, 32, 4


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def module(embed=E, heads=H, seed=1, **sizes):
    """A module and its random weights."""
    mha = bx.MultiHeadAttention(embed, heads, **sizes)
    fan = {"w_q": embed, "w_k": embed, "w_v": embed, "w_out": heads * mha.d_v}
    shapes = {
        "w_q": (heads, mha.d_k, embed),
        "w_k": (mha.kv_heads, mha.d_k, embed),
        "w_v": (mha.kv_heads, mha.d_v, embed),
        "w_out": (heads, mha.d_v, mha.out_dim),
    }
    state = {n: normal(*shapes[n], seed=seed) / np.float32(fan[n] ** 0.5) for n in shapes}
    mha.load_state_dict(state)
    return mha, state


def tables(positions, pairs):
    angle = np.arange(positions)[:, None] * 100.0 ** -(np.arange(pairs) / pairs)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


RNG = np.random.default_rng(2)
OPTIONS = {
    "cross": {"x_kv": normal(B, S, E, seed=9)},
    "causal": {"causal": True},
    "rope": {"rope": tables(50, 4)},
    "rope-part": {"rope": tables(50, 1)},
    "mask": {"mask": RNG.random((B, H, S, S)) < 0.6},
    "mask-rows": {"mask": RNG.random((S, S)) < 0.6},
    "mask-keys": {"mask": RNG.standard_normal((B, 1, 1, S), np.float32)},
    "first": {"reuse_first_head_kv": True},
    "added": {"add_input": True},
    "dropout": {"training": True, "seed": 11},
    "parts": {"save_peak_mem_factor": 2},
    "many-parts": {"save_peak_mem_factor": 8},
    "cached": {"cache_kv": True},
    "appended": {"append_kv": True},
}
CACHED = normal(B, S, E, seed=8)  # what a cache was filled from
OTHERS = {  # of the module, the input and the cache
    "widths": {"d_k": 9, "d_v": 5},
    "out-width": {"out_dim": 40},
    "scaled": {"softmax_scale": -0.3},
    "half": {"dtype": np.float16},
    "cached-first": {"cache_kv": True, "only_cache_first_head_kv": True},
    "used": {"use_cached_kv": True, "cached": CACHED},
    "used-first": {"use_cached_kv": True, "cached": CACHED, "only_cache_first_head_kv": True},
}
_CACHES = {"cache_kv", "append_kv", "use_cached_kv"}


def _pairs(options):
    """Every two that can stand together."""
    return [
        (a, b)
        for a, b in itertools.combinations(options, 2)
        if not options[a].keys() & options[b].keys()
        if len((options[a].keys() | options[b].keys()) & _CACHES) < 2
        if {a, b} != {"added", "out-width"}
    ]


PAIRS = _pairs(OPTIONS)
ALL_PAIRS = _pairs(OPTIONS | OTHERS)


def problem(pair, dropout_p):
    """The module of two options, its weights, an input, and the options of :func:`call`."""
    every = OPTIONS | OTHERS
    options = every[pair[0]] | every[pair[1]]
    sizes = ("d_k", "d_v", "out_dim", "softmax_scale")
    own = {name: options.pop(name) for name in sizes if name in options}
    x = normal(B, S, E).astype(options.pop("dtype", np.float32))
    mha, state = module(kv_heads=2, dropout_p=dropout_p if "training" in options else 0.0, **own)
    return mha, state, x, options


def call(mha, x, *, cached=None, **options):
    """One call, after the one that fills the cache from ``cached``."""
    mha.clear_cache()
    if cached is not None:
        first = options.pop("only_cache_first_head_kv", False)
        rope = options.get("rope")
        mha(cached, rope=rope, cache_kv=True, only_cache_first_head_kv=first)
    return mha(x, **options)


def definition(options, mha):
    """The options as reference_attention.multi_head takes them."""
    kept = ("x_kv", "causal", "rope", "mask", "add_input")
    wanted = {name: options[name] for name in kept if name in options}
    wanted["scale"] = mha.softmax_scale
    wanted["first_head"] = options.get("reuse_first_head_kv", False)
    if "cached" in options:
        wanted["x_kv"] = options["cached"]
        wanted["first_head"] |= options.get("only_cache_first_head_kv", False)
    if "training" in options:
        wanted |= {"dropout_p": mha.dropout_p, "seed": 11 + np.arange(B)}
    return wanted


def first_sequence(options):
    """The options for the first sequence alone."""
    cut = {
        name: options[name][:1]
        for name in ("x_kv", "mask", "cached")
        if name in options and np.ndim(options[name]) > 2
    }
    return options | cut
