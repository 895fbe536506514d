"""A layer in one call against its ops one by one, and what it refuses."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from layer_by_ops import LayerByOps

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.memory.workspace import Workspace

TINY = bx.BitNetConfig.tiny()
PLAIN = replace(
    TINY, norm="layer", position="learned", gated_ffn=False, attention_bias=True, ffn_bias=True
)
INSIDE = replace(TINY, linear_norm=True, attn_sub_norm=False, ffn_sub_norm=False)
# Halves of gate and up in whole panels, so that many rows have their activation as the epilogue.
PANELS = replace(TINY, intermediate_size=192)
PANELS_WITHOUT_NORM = replace(PANELS, ffn_sub_norm=False, hidden_act="silu")
CONFIGS = {
    "tiny": TINY,
    "plain": PLAIN,
    "plain without sub-norm": replace(PLAIN, ffn_sub_norm=False, hidden_act="gelu"),
    "norms inside": INSIDE,
    "panels": PANELS,
    "panels without norm": PANELS_WITHOUT_NORM,
}
# Whose tables serve more panels than an epilogue could wait for.
LOOKUP_ISAS = ("avx2", "avx512") + (("avx512vnni",) if "AMD" in _core.cpu_brand() else ())


def int32(*values):
    return np.array(values, np.int32)


def logits(model, counts):
    """Of a prefill and of a decode step after it."""
    ids = [list(range(1, n + 1)) for n in counts]
    cache = model.new_cache(len(counts))
    active = np.array(counts) > 0
    first = model.prefill(ids, cache)
    return first, model.decode(np.full(len(counts), 7), cache, active=active)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("counts", [(1,), (5, 0, 1, 33), (60, 70)])
def test_a_layer_is_its_ops(isa, name, counts):
    config = CONFIGS[name]
    model = bx.BitNetModel.random(config, seed=3)
    engine = model._engine
    found = logits(model, counts)
    seen = []
    engine.layers = [LayerByOps(layer, config, seen) for layer in engine.weights.layers]
    wanted = logits(model, counts)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    layer = engine.weights.layers[0]
    assert len(seen) == 2 * config.num_layers * (len(layer.qkv) + len(layer.gate_up) + 2)


@pytest.mark.parametrize("config", [PANELS, PANELS_WITHOUT_NORM])
def test_an_activation_is_an_epilogue_of_many_rows(isa, config):
    model = bx.BitNetModel.random(config)
    ran = {}
    for rows in (1, 60):
        with bx.DispatchMetrics() as metrics:
            model.forward_full(np.arange(1, rows + 1))
        ran[rows] = {op for op, *_ in metrics.as_dict()}
    assert "act_quant" in ran[1]
    assert ("act_quant" not in ran[60]) == (isa not in LOOKUP_ISAS)
    if config is PANELS_WITHOUT_NORM:
        assert ("quantise" in ran[60]) == (isa not in LOOKUP_ISAS)


@pytest.mark.parametrize("config", [PANELS, PANELS_WITHOUT_NORM])
def test_rows_without_a_largest_element_are_nan(isa, config):
    """NaN and infinity pass through the epilogue as through the ops, and zeros stay finite."""
    weights = bx.BitNetModel.random(config)._engine.weights.layers[0]
    ours, theirs = arguments(60), arguments(60)
    for given in (ours, theirs):
        given["hidden"][:] = np.linspace(-2, 2, given["hidden"].size).reshape(60, -1)
        given["hidden"][4] = 0
        given["hidden"][58:, 5] = np.nan, np.inf
    _core.Layer(weights, config.hidden_act, True, 1.0).forward(
        **ours | {"buffers": Workspace(config, 60).buffers}
    )
    theirs["layer"] = theirs.pop("cache_layer")
    LayerByOps(weights, config, []).forward(**theirs)
    np.testing.assert_array_equal(ours["hidden"], theirs["hidden"])
    assert np.isnan(ours["hidden"][58:]).all()
    assert np.isfinite(ours["hidden"][:58]).all()


@pytest.fixture(scope="module")
def model():
    return bx.BitNetModel.random(TINY)


def arguments(rows=3):
    """Of a step that fits."""
    cache = _core.KVCache(1, 1, TINY.num_kv_heads, TINY.head_dim, TINY.head_dim, 64, "f32")
    cache.reserve(int32(rows))
    angles = np.zeros((rows, TINY.head_dim // 2), np.float32)
    return {
        "hidden": np.ones((rows, TINY.hidden_size), np.float32),
        "buffers": Workspace(TINY, rows).buffers,
        "cache": cache,
        "cache_layer": 0,
        "cos": angles,
        "sin": angles,
        "seq": int32(*[0] * rows),
        "pos": int32(*range(rows)),
        "starts": int32(0, rows),
        "first_pos": int32(0),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": np.ones((3, 95), np.float32)}, "hidden: found"),
        ({"hidden": np.ones((3, 96))}, "hidden: found float64"),
        ({"buffers": Workspace(TINY, 2).buffers}, "buffers: found room for fewer rows"),
        ({"cache_layer": 1}, "layer: found 1"),
        ({"cos": np.zeros((3, 7), np.float32)}, "cos: found rows of 7"),
        ({"sin": None}, "cos, sin: found"),
        ({"cos": np.zeros((2, 8), np.float32), "sin": np.zeros((2, 8), np.float32)}, "rows of cos"),
        ({"seq": int32(0, 0, 1)}, "seq: found 1"),
        ({"pos": int32(0, 1, 64)}, "pos: found 64"),
        ({"starts": int32(0, 2)}, "starts: found 0 to 2"),
        ({"first_pos": int32(62)}, "first_pos: found 62"),
        ({"kept": int32(4)}, "kept: found 4"),
        ({"kept": int32(-1)}, "kept: found -1"),
        ({"kept": int32(1, 1)}, "kept: found"),
    ],
)
def test_a_layer_refuses_what_does_not_fit(model, change, message):
    layer = model._engine.layers[0]
    fitting = arguments()
    layer.forward(**fitting)
    assert not np.array_equal(fitting["hidden"], np.ones_like(fitting["hidden"]))
    broken = arguments() | change
    before = broken["hidden"].copy()
    with pytest.raises(InvalidShapeError, match=message):
        layer.forward(**broken)
    np.testing.assert_array_equal(broken["hidden"], before)


def test_norms_inside_need_their_buffer():
    layer = bx.BitNetModel.random(INSIDE)._engine.layers[0]
    layer.forward(**arguments() | {"buffers": Workspace(INSIDE, 3).buffers})
    with pytest.raises(InvalidShapeError, match="buffers: found room"):
        layer.forward(**arguments())  # of a model without such norms


def matrix(n, k):
    return bx.PackedTernary.pack(np.zeros((n, k), np.int8), 1.0)


def linear(n, k, **options):
    none = SimpleNamespace(kind="none", eps=0.0, weight=None, bias=None)
    return SimpleNamespace(**{"weight": matrix(n, k), "bias": None, "norm": none} | options)


def weights(**change):
    rms = SimpleNamespace(kind="rms", eps=1e-5, weight=np.ones(32, np.float32), bias=None)
    fitting = {
        "attn_norm": rms,
        "qkv": (linear(96, 32),),
        "o": linear(32, 32),
        "ffn_norm": rms,
        "gate_up": (linear(80, 32),),
        "down": linear(32, 40),
    }
    return SimpleNamespace(**fitting | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (linear(96, 31),)}, r"qkv: found \[96, 31\], wanted 32 inputs"),
        ({"qkv": ()}, "qkv: found no matrices"),
        ({"gate_up": (linear(81, 32),)}, "gate_up: found 81 outputs"),
        ({"down": linear(32, 80)}, r"down: found \[32, 80\], wanted 40 inputs"),
        ({"down": linear(31, 40)}, r"down: found \[31, 40\], wanted 32 outputs"),
        ({"o": linear(32, 32, bias=np.zeros(31, np.float32))}, "bias: found"),
    ],
)
def test_layers_refuse_weights_that_do_not_fit(change, message):
    _core.Layer(weights(), "relu2", True, 1.0)
    with pytest.raises(InvalidShapeError, match=message):
        _core.Layer(weights(**change), "relu2", True, 1.0)
    with pytest.raises(InvalidShapeError, match="act: found 'selu'"):
        _core.Layer(weights(), "selu", True, 1.0)
