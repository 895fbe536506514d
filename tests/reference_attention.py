"""Float64 definitions of RoPE and attention, one query at a time."""

import numpy as np


def rotate(x, cos, sin):
    """Half-rotation of ``x`` [..., D] by tables [D / 2]."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def causal_attention(q, k, v, past, scale, window_left=-1):
    """``q`` [T, Hq, Dk] stands at positions past.. over ``k`` [past + T, Hkv, Dk], ``v``: float64
    [T, Hq, Dv]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    group = q.shape[1] // k.shape[1]
    out = np.zeros((*q.shape[:2], v.shape[2]))
    for t in range(len(q)):
        low = max(0, past + t - window_left) if window_left >= 0 else 0
        for h in range(q.shape[1]):
            keys = k[low : past + t + 1, h // group]
            scores = scale * (keys @ q[t, h])
            weights = np.exp(scores - scores.max())
            out[t, h] = weights @ v[low : past + t + 1, h // group] / weights.sum()
    return out


def round_kv(x, kv_dtype):
    """``x`` [..., D] as a cache of ``kv_dtype`` gives it back, float64."""
    x = np.asarray(x, np.float32)
    if kv_dtype == "f32":
        return x.astype(np.float64)
    if kv_dtype == "f16":
        return x.astype(np.float16).astype(np.float64)
    absmax = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-30))
    codes = np.rint(x * (np.float32(127) / absmax)).clip(-128, 127)
    return codes.astype(np.float64) * (absmax / np.float32(127)).astype(np.float64)


def philox(seed, first, second, third):
    """Philox4x32-10: the four words of counters (first, second, third, 0), as uint64 arrays."""
    low_half = np.uint64(0xFFFFFFFF)
    half = np.uint64(32)
    c = [np.asarray(x, np.uint64) & low_half for x in np.broadcast_arrays(first, second, third, 0)]
    keys = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            b >> half ^ c[1] ^ np.uint64(keys[0]),
            b & low_half,
            a >> half ^ c[3] ^ np.uint64(keys[1]),
            a & low_half,
        ]
        keys = [(keys[0] + 0x9E3779B9) & 0xFFFFFFFF, (keys[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def kept_weights(seed, positions, heads, keys, dropout_p):
    """bool [heads, len(positions), keys]: the weights that dropout keeps."""
    j = np.arange(keys)
    rows = np.asarray(positions, np.int64)[None, :, None] % 2**32
    words = philox(seed, j // 64 * 16 + j % 16, rows, np.arange(heads)[:, None, None])
    word = np.choose(j // 16 % 4, words)
    return word >> np.uint64(8) >= np.uint64(np.rint(dropout_p * 2**24))


def coded_weights(p, v_scales, first):
    """Weights ``p`` of the keys numbered ``first`` as int8 attention multiplies them, and how far
    each may be off where float32 rounds the other way: those within 1e-2 of a half-integer."""
    w = p * v_scales
    codes, slack = np.zeros_like(p), np.zeros_like(p)
    for block in np.unique(first // 64):
        here = first // 64 == block
        unit = max(w[here].max(), 1e-30) / 2047
        exact = w[here] / unit
        codes[here] = np.rint(exact) * unit
        slack[here] = np.where(abs(exact % 1 - 0.5) < 1e-2, unit, 0.0)
    return codes / v_scales, slack / v_scales


def attention(
    q,
    k,
    v,
    *,
    causal=False,
    past_len=0,
    mask=None,
    scale=None,
    softcap=0.0,
    window=None,
    kv_lengths=None,
    dropout_p=0.0,
    seed=None,
    precision="f32",
    return_scores=None,
):
    """``bx.attention`` of [B, H, T, D] arrays in float64, a row at a time.

    With ``return_scores="slack"`` and int8, how far a row may be off: by weights next to a
    half-integer.
    """
    dk, (b, hq, tq, _), tk = q.shape[-1], q.shape, k.shape[2]
    share = hq // k.shape[1] if k.shape[1] else 1
    scale = dk**-0.5 if scale is None else scale
    if precision == "int8":
        v_scales = np.maximum(np.abs(np.asarray(v, np.float32)).max(-1, initial=0), 1e-30) / 127.0
        v_scales = np.repeat(v_scales, share, 1)
        q, k, v = (round_kv(x, "int8") for x in (q, k, v))
    q = np.asarray(q, np.float64)
    k, v = (np.repeat(np.asarray(x, np.float64), share, 1) for x in (k, v))
    left, right = window or (-1, -1)
    right = 0 if causal else right
    scores = {"raw": scale * np.einsum("bhqd,bhkd->bhqk", q, k)}
    s = scores["raw"]
    scores["softcap"] = s = softcap * np.tanh(s / softcap) if softcap else s
    lengths = np.full(b, tk) if kv_lengths is None else np.asarray(kv_lengths)
    offsets = np.full(b, past_len) if kv_lengths is None else lengths - tq
    at = np.arange(tq)[None, :] + offsets[:, None]
    j = np.arange(tk)
    seen = j < lengths[:, None, None]
    if left >= 0:
        seen = seen & (j >= at[..., None] - left)
    if right >= 0:
        seen = seen & (j <= at[..., None] + right)
    seen = np.broadcast_to(seen[:, None], s.shape)
    if mask is not None:
        mask = np.asarray(mask)
        if mask.dtype == bool:
            mask = np.where(mask, 0.0, -np.inf)
        if mask.shape[-1] not in (1, tk):
            short = [(0, 0)] * (mask.ndim - 1) + [(0, tk - mask.shape[-1])]
            mask = np.pad(mask.astype(np.float64), short, constant_values=-np.inf)
        mask = np.broadcast_to(mask.astype(np.float64), s.shape)
        seen = seen & (mask != -np.inf)
        s = s + np.where(seen, mask, 0.0)
    seen = seen & (s != -np.inf)
    scores["mask"] = s = np.where(seen, s, -np.inf)
    scores["softmax"] = p = np.zeros_like(s)
    out = np.zeros((b, hq, tq, v.shape[-1]))
    scores["slack"] = slack = np.zeros((b, hq, tq, 1))
    seeds = np.broadcast_to(0 if seed is None else seed, b)
    for n in range(b):
        kept = kept_weights(int(seeds[n]), at[n], hq, tk, dropout_p)
        for h, i in np.ndindex(hq, tq):
            keys = seen[n, h, i]
            if not keys.any():
                continue
            e = np.exp(s[n, h, i, keys] - s[n, h, i, keys].max())
            p[n, h, i, keys] = e / e.sum()
            weights = p[n, h, i, keys] * kept[h, i, keys] / (1 - dropout_p)
            if precision == "int8":
                weights, off = coded_weights(weights, v_scales[n, h, keys], np.flatnonzero(keys))
                slack[n, h, i] = off @ np.abs(v[n, h, keys]).max(-1, initial=0)
            out[n, h, i] = weights @ v[n, h, keys]
    return out if return_scores is None else (out, scores[return_scores])


def multi_head(
    state, x, x_kv=None, *, rope=None, past=0, add_input=False, first_head=False, **rest
):
    """``MultiHeadAttention`` of x [B, S, E] in float64; ``rest`` goes to :func:`attention`."""
    w = {name: np.asarray(weight, np.float64) for name, weight in state.items()}
    x = np.asarray(x, np.float64)
    x_kv = x if x_kv is None else np.asarray(x_kv, np.float64)
    heads = slice(1 if first_head else None)
    q, k, v = (
        np.einsum("bse,hde->bhsd", a, weight)
        for a, weight in ((x, w["w_q"]), (x_kv, w["w_k"][heads]), (x_kv, w["w_v"][heads]))
    )
    if rope is not None:
        cos, sin = (np.asarray(table, np.float64) for table in rope)
        turned = 2 * cos.shape[1]
        for a, first in ((q, past), (k, 0)):
            at = np.arange(first, first + a.shape[2])
            a[..., :turned] = rotate(a[..., :turned], cos[at], sin[at])
    out = np.einsum("bhsd,hde->bse", attention(q, k, v, past_len=past, **rest), w["w_out"])
    return out + x if add_input else out


def attention_gradients(d_out, q, k, v, **options):
    """(dq, dk, dv) of :func:`attention` in float64, from its weights."""
    p = attention(q, k, v, **options, return_scores="softmax")[1]
    capped = attention(q, k, v, **options, return_scores="softcap")[1]
    b, hq, tq, tk = p.shape
    share = hq // k.shape[1]
    d_out, q = np.asarray(d_out, np.float64), np.asarray(q, np.float64)
    k, v = (np.repeat(np.asarray(x, np.float64), share, 1) for x in (k, v))
    dropped = options.get("dropout_p", 0.0)
    lengths = options.get("kv_lengths")
    offsets = [options.get("past_len", 0)] * b if lengths is None else np.asarray(lengths) - tq
    seeds = np.broadcast_to(options.get("seed", 0), b)
    kept = [
        kept_weights(int(seed), np.arange(tq) + offset, hq, tk, dropped)
        for seed, offset in zip(seeds, offsets, strict=True)
    ]
    kept = np.array(kept).reshape(p.shape) / (1 - dropped)
    g = np.einsum("bhqd,bhkd->bhqk", d_out, v) * kept
    ds = p * (g - (p * g).sum(-1, keepdims=True))
    if cap := options.get("softcap"):
        ds *= 1 - (capped / cap) ** 2
    scale = options.get("scale")
    ds *= q.shape[-1] ** -0.5 if scale is None else scale
    by_head = [np.einsum("bhqk,bhqd->bhkd", *x) for x in ((ds, q), (p * kept, d_out))]
    dk, dv = (x.reshape(b, hq // share, share, *x.shape[2:]).sum(2) for x in by_head)
    return np.einsum("bhqk,bhkd->bhqd", ds, k), dk, dv


def multi_head_gradients(
    state, d_out, x, x_kv=None, *, rope=None, past=0, add_input=False, first_head=False, **rest
):
    """Gradients of :func:`multi_head`, float64: (x, x_kv or None, weights by name)."""
    w = {name: np.asarray(weight, np.float64) for name, weight in state.items()}
    d_out, x = np.asarray(d_out, np.float64), np.asarray(x, np.float64)
    source = x if x_kv is None else np.asarray(x_kv, np.float64)
    heads = slice(1 if first_head else None)
    inputs = {"w_q": (x, w["w_q"]), "w_k": (source, w["w_k"][heads])}
    inputs["w_v"] = source, w["w_v"][heads]
    q, k, v = (np.einsum("bse,hde->bhsd", *inputs[name]) for name in ("w_q", "w_k", "w_v"))

    def turn(a, first, sign):
        if rope is None:
            return a
        cos, sin = (np.asarray(table, np.float64) for table in rope)
        turned, at = 2 * cos.shape[1], np.arange(first, first + a.shape[2])
        return np.concatenate(
            [rotate(a[..., :turned], cos[at], sign * sin[at]), a[..., turned:]], -1
        )

    q, k = turn(q, past, 1), turn(k, 0, 1)
    rest["past_len"] = past
    before = np.einsum("bse,hde->bhsd", d_out, w["w_out"])
    dq, dk, dv = attention_gradients(before, q, k, v, **rest)
    by_head = {"w_q": turn(dq, past, -1), "w_k": turn(dk, 0, -1), "w_v": dv}
    weights = {name: np.zeros_like(weight) for name, weight in w.items()}
    weights["w_out"] = np.einsum("bhsd,bse->hde", attention(q, k, v, **rest), d_out)
    grads = [np.zeros_like(x), np.zeros_like(source)]
    for name, gradient in by_head.items():
        weights[name][: gradient.shape[1]] = np.einsum("bhsd,bse->hde", gradient, inputs[name][0])
        grads[name != "w_q"] += np.einsum("bhsd,hde->bse", gradient, inputs[name][1])
    grads[0] += d_out if add_input else 0
    return (grads[0] + grads[1], None, weights) if x_kv is None else (*grads, weights)
