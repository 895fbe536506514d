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
PAIRS = [
    pair
    for pair in itertools.combinations(OPTIONS, 2)
    if not OPTIONS[pair[0]].keys() & OPTIONS[pair[1]].keys()
    if set(pair) != {"cached", "appended"}
]


def definition(options):
    """The options as reference_attention.multi_head takes them."""
    names = {"reuse_first_head_kv": "first_head"}
    kept = ("x_kv", "causal", "rope", "mask", "add_input", "reuse_first_head_kv")
    wanted = {names.get(n, n): options[n] for n in kept if n in options}
    if "training" in options:
        wanted |= {"dropout_p": 0.2, "seed": 11 + np.arange(B)}
    return wanted


def first_sequence(options):
    """The options for the first sequence alone."""
    cut = {
        name: options[name][:1]
        for name in ("x_kv", "mask")
        if name in options and np.ndim(options[name]) > 2
    }
    return options | cut
