"""One answer, bit for bit: however tokens are batched and cut, on any threads, on every ISA."""

import dataclasses

import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext.config import BitNetConfig, RopeScaling
from bitnet_ext.model.load import RandomWeights, load_weights
from bitnet_ext.model.transformer import Transformer

LONG = 3 * 512 + 1  # over three chunks of keys, plus one
# M on both sides of each switch: rows that a gemv, a pass of it or the streamed vocabulary takes,
# query vectors of an attention tile, rows of a gemm task and of a vocabulary panel.
SIZES = (1, 2, 4, 5, 7, 8, 11, 12, 16, 24, 25, 32, 33, 48, 49, 383, 385)

DEEP = dataclasses.replace(
    BitNetConfig.tiny(), vocab_size=131, hidden_size=48, intermediate_size=80, num_layers=2
)
WIDE = dataclasses.replace(
    DEEP, hidden_size=32, num_heads=4, head_dim=8, intermediate_size=6912, num_layers=1
)
GPT2 = dataclasses.replace(
    BitNetConfig.gpt2_small(),
    vocab_size=101,
    hidden_size=60,
    intermediate_size=240,
    num_layers=2,
    num_heads=3,
    num_kv_heads=3,
    head_dim=20,
    head_bias=True,
)
LLAMA = dataclasses.replace(
    DEEP,
    hidden_act="silu",
    attn_sub_norm=False,
    ffn_sub_norm=False,
    linear_norm=True,
    scale_rule="divide",
    tie_word_embeddings=False,
    rope_scaling=RopeScaling("llama3", 8.0, original_max_position_embeddings=64),
)
MODELS = {
    "bitnet": (DEEP, {}),
    "half": (DEEP, {"kv_dtype": "f16"}),
    "int8": (DEEP, {"kv_dtype": "int8", "head": "int8"}),
    "gpt2": (GPT2, {}),
    "llama": (LLAMA, {}),
    "gelu": (dataclasses.replace(GPT2, hidden_act="gelu", gated_ffn=True), {}),
}


def make(config, kv_dtype="f32", head="exact"):
    return Transformer(config, load_weights(RandomWeights(config, 5), head), kv_dtype)


def ids_of(config, count, seed=1):
    return np.random.default_rng(seed).integers(0, config.vocab_size, count)


def chunked(model, ids, size):
    """Last logits by prefill in chunks, and the next step's, which see every key written."""
    cache = model.new_cache(max_seq_len=len(ids) + 1)
    last = model.prefill(ids, cache, chunk_size=size)
    return np.stack([last, model.decode(ids[:1], cache)[0]])


def assert_bits(found, wanted, what=None):
    assert found.shape == wanted.shape
    assert found.tobytes() == wanted.tobytes(), what


@pytest.fixture(scope="module")
def deep():
    return make(DEEP)


@pytest.fixture(scope="module")
def wide():
    return make(WIDE)


@pytest.fixture(scope="module")
def deep_logits(deep):
    """forward_full of one long sequence and the token after it, on the best ISA."""
    ids = ids_of(DEEP, LONG + 1)
    ids[-1] = ids[0]
    return deep.forward_full(ids)


@pytest.fixture(scope="module")
def wide_logits(wide):
    ids = ids_of(WIDE, 401)
    ids[-1] = ids[0]
    return wide.forward_full(ids)


def test_full_incremental_and_chunked_agree_over_a_long_sequence(isa, deep, deep_logits):
    ids = ids_of(DEEP, LONG)
    # The scalar definition is slow: step by step only past the first chunk of keys.
    steps = 520 if isa == "scalar" else LONG
    assert_bits(deep.forward_full(ids), deep_logits[:-1])
    assert_bits(deep.forward_incremental(ids[:steps]), deep_logits[:steps])
    for size in (100,) if isa == "scalar" else (None, 64, 100, 511):
        assert_bits(chunked(deep, ids, size), deep_logits[-2:], size)


def test_chunks_on_both_sides_of_each_kernel_switch_agree(isa, wide, wide_logits):
    ids = ids_of(WIDE, 400)
    assert_bits(wide.forward_full(ids), wide_logits[:-1])
    for size in SIZES:
        assert_bits(chunked(wide, ids, size), wide_logits[-2:], size)
        assert_bits(wide.forward_full(ids, logits_to_keep=size), wide_logits[-1 - size : -1], size)


@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_threads_change_nothing(threads, threads_used, deep, deep_logits, wide, wide_logits):
    bx.set_num_threads(threads_used)
    ids = ids_of(DEEP, LONG)
    assert_bits(deep.forward_full(ids), deep_logits[:-1])
    assert_bits(deep.forward_incremental(ids[:600]), deep_logits[:600])
    assert_bits(chunked(wide, ids_of(WIDE, 400), 200), wide_logits[-2:])


@pytest.mark.parametrize("name", MODELS)
def test_every_family_and_mode_agrees_with_itself_everywhere(name, threads):
    config, options = MODELS[name]
    model = make(config, **options)
    ids = ids_of(config, 140)
    wanted = model.forward_full(ids)
    assert np.isfinite(wanted).all()
    for isa in bx.available_isas():
        for threads_used in (1, 3):
            bx.set_isa(isa)
            bx.set_num_threads(threads_used)
            assert_bits(model.forward_full(ids), wanted, (isa, threads_used))
            assert_bits(chunked(model, ids[:-1], 33)[0], wanted[-2], (isa, threads_used))
        assert_bits(model.forward_incremental(ids[:70]), wanted[:70], isa)
    bx.set_isa("auto")


LENGTHS = [1, 70, 0, 5, 513, 64, 2]


@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5, 6], [4, 0, 3], [6, 5, 1, 0], [1, 1, 1]])
def test_batches_of_any_composition_agree_with_each_alone(isa, deep, order):
    prompts = [ids_of(DEEP, n, seed=n) for n in LENGTHS]
    batch = [prompts[i] for i in order]
    alone = [deep.forward_full(p) if len(p) else np.empty((0, DEEP.vocab_size)) for p in batch]
    for found, wanted in zip(deep.forward_full([p.tolist() for p in batch]), alone, strict=True):
        assert_bits(np.asarray(found, wanted.dtype), wanted)
    padded = np.zeros((len(batch), max(len(p) for p in batch)), int)
    for row, prompt in zip(padded, batch, strict=True):
        row[: len(prompt)] = prompt
    lengths = [len(p) for p in batch]
    full = deep.forward_full(padded, lengths=lengths)
    for found, wanted in zip(full, alone, strict=True):
        assert_bits(found[: len(wanted)], wanted.astype(np.float32))
        assert not found[len(wanted) :].any()
    cache = deep.new_cache(len(batch), padded.shape[1])
    last = deep.prefill(padded, cache, lengths=lengths, chunk_size=37)
    for found, wanted in zip(last, alone, strict=True):
        assert (
            np.isnan(found).all() if len(wanted) == 0 else found.tobytes() == wanted[-1].tobytes()
        )


def test_decoding_some_rows_of_a_batch_agrees_with_each_alone(isa, deep):
    prompts = [ids_of(DEEP, n, seed=n) for n in (70, 3, 520)]
    logits = [deep.forward_full(p) for p in prompts]
    cache = deep.new_cache(3, 520)
    begun = [60, 1, 512]
    deep.prefill([p[:n].tolist() for p, n in zip(prompts, begun, strict=True)], cache)
    while (cache.length < [70, 3, 520]).any():
        held = cache.length
        active = held < [70, 3, 520]
        active[held[0] % 3] = False  # one row waits now and then
        if not active.any():
            active = held < [70, 3, 520]
        step = [p[min(n, len(p) - 1)] for p, n in zip(prompts, held, strict=True)]
        out = deep.decode(step, cache, active=active)
        for i in range(3):
            if active[i]:
                assert_bits(out[i], logits[i][held[i]])
            else:
                assert np.isnan(out[i]).all()


def test_each_isa_variant_of_each_op_ran(isa, deep, wide):
    """What the other tests rest on: forcing an ISA reaches every kernel, gemv and gemm alike."""
    with bx.DispatchMetrics() as metrics:
        deep.forward_full(ids_of(DEEP, 60))
        deep.forward_incremental(ids_of(DEEP, 3))
    ran = {(op, isa) for op, _, isa, _ in metrics.as_dict()}
    table = {concept: info["current"] for concept, info in bx.dispatch_info().items()}
    assert ran == {
        ("ternary_gemm", table["ternary"]),
        ("ternary_gemv", table["ternary"]),
        ("rope_append", table["attention"]),
        ("attention_prefill", table["attention"]),
        ("attention_decode", table["attention"]),
        ("embed", table["rowwise"]),
        ("norm", table["rowwise"]),
        ("norm_quant", table["rowwise"]),
        ("act_quant", table["rowwise"]),
        ("vocab_project", table["vocab"]),
    }
    assert table["ternary"] == isa


def test_every_heavy_op_used_more_than_one_thread(threads, wide):
    """On the slowest ISA, so that a sleeping worker wakes in time."""
    heavy = {"ternary_gemm", "attention_prefill", "act_quant", "vocab_project"}
    bx.set_isa("scalar")
    bx.set_num_threads(2)
    ids = ids_of(WIDE, 400)
    for _ in range(20):
        with bx.DispatchMetrics() as metrics:
            wide.forward_full(ids)
        alone = {op for (op, *_), count in metrics.as_dict().items() if count.threads < 2}
        heavy &= alone
        if not heavy:
            break
    bx.set_isa("auto")
    assert not heavy
