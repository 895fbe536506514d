"""Packing of ternary weights from every kind of source, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import reference_formats as formats
from hypothesis import given, settings
from hypothesis import strategies as st
from ternary_cases import BITS, product, random_codes, source

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.errors import CheckpointError, InvalidShapeError


@pytest.mark.parametrize("kind", formats.KINDS)
@pytest.mark.parametrize("bits", BITS)
def test_every_source_kind(kind: str, bits: str) -> None:
    n, k = 196, 512
    rng = np.random.default_rng(7)
    codes = random_codes(n, k)
    scale = 1.25
    if kind in ("f32", "f16", "bf16"):
        latent = rng.standard_normal((n, k), np.float32) * np.float32(0.02)
        latent[0, :4] = [0.0, -0.0, 1e-40, -1e-40]  # subnormals and signed zeros
        data = {
            "f32": lambda: latent,
            "f16": lambda: latent.astype(np.float16).view(np.uint16),
            "bf16": lambda: formats.to_bf16(latent),
        }[kind]()
        stored = {
            "f32": lambda: latent,
            "f16": lambda: data.view(np.float16).astype(np.float32),
            "bf16": lambda: formats.from_bf16(data),
        }[kind]()
        codes, expected_scale = formats.absmean(stored)
        given = 0.0
    else:
        data = formats.encode(kind, codes, scale)
        expected_scale = given = scale
    weight = _core.PackedTernary.from_sources([source(kind, data, n, k, given)], bits)
    np.testing.assert_array_equal(weight.unpack(), codes)
    assert weight.scale == pytest.approx(float(expected_scale), rel=1e-7)
    order = rng.permutation(n).astype(np.int32)
    mixed = _core.PackedTernary.from_sources([source(kind, data, n, k, given, order=order)], bits)
    np.testing.assert_array_equal(mixed.unpack(), codes[order])


def test_latent_ties_and_scale() -> None:
    """w s at exactly one half rounds to the even 0; a zero matrix takes the floor of 1e-5."""
    latent = np.array([[1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 0.5, 0.5]], np.float32)
    assert np.abs(latent).mean() == 1
    weight = _core.PackedTernary.from_sources([source("f32", latent, 1, 8, 0.0)], "2")
    np.testing.assert_array_equal(weight.unpack(), [[1, -1, 0, 0, 1, -1, 0, 0]])
    assert weight.scale == 1
    zero = _core.PackedTernary.from_sources(
        [source("f32", np.zeros((4, 8), np.float32), 4, 8, 0.0)], "2"
    )
    assert zero.scale == pytest.approx(1e-5)
    assert not zero.unpack().any()


@pytest.mark.parametrize("kind", ["hf", "tq2_0", "i2_s", "i2_s_arm", "i2_s_rows4"])
def test_field_of_three_names_the_tensor(kind: str) -> None:
    data = formats.encode(kind, random_codes(128, 256), 1.0)
    for position in (0, 17, 63):
        bad = data.copy()
        bad.reshape(-1)[position] |= 3
        with pytest.raises(CheckpointError, match=r"layers\.0\.q: found a 2-bit field of 3"):
            _core.PackedTernary.from_sources([source(kind, bad, 128, 256)], "2")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_latent_weights_must_be_finite(kind: str, value: float) -> None:
    latent = np.ones((8, 16), np.float32)
    latent[5, 3] = value
    data = {
        "f32": lambda: latent,
        "f16": lambda: latent.astype(np.float16).view(np.uint16),
        "bf16": lambda: latent.view(np.uint32).astype(np.uint32) >> 16,
    }[kind]()
    data = data if kind == "f32" else data.astype(np.uint16)
    with pytest.raises(CheckpointError, match=r"layers\.0\.q: .*row 5 that is not finite"):
        _core.PackedTernary.from_sources([source(kind, data, 8, 16, 0.0)], "2")


def test_bad_sources_are_refused() -> None:
    good = random_codes(8, 256)
    hf = formats.encode("hf", good)

    def refused(match: str, *sources: tuple) -> None:
        with pytest.raises(CheckpointError, match=match):
            _core.PackedTernary.from_sources(list(sources), "2")

    two = np.full((8, 256), 2, np.int8)
    refused("a weight other than -1, 0 and 1", source("codes", two, 8, 256))
    for scale in (0.0, -1.0, np.nan, np.inf):
        refused("found a scale of", source("codes", good, 8, 256, scale))
    refused("found data of", source("hf", hf[:1], 8, 256))
    refused("found data of", source("codes", good.astype(np.uint8), 8, 256))
    refused("found data of", source("codes", good[:, ::2], 8, 128))
    refused("a multiple of 4 rows", source("hf", hf, 7, 256))
    refused("columns a multiple of 256", source("tq1_0", hf.reshape(-1), 8, 100))
    refused("a multiple of 128 weights", source("i2_s", hf.reshape(-1), 1, 100))
    refused("a multiple of 64 weights", source("i2_s_arm", hf.reshape(-1), 1, 100))
    refused("a multiple of 4 rows", source("i2_s_rows4", hf.reshape(-1), 7, 256))
    huge = np.empty((0, 5_000_000), np.int8)
    refused("columns, wanted at most 4194304", source("codes", huge, 0, 5_000_000))
    refused("found a matrix of 1099511627776 x", source("codes", good, 2**40, 2**30))
    refused("found a matrix of -8 x", source("codes", good, -8, 256))
    refused("wanted one of codes", source("q4_0", good, 8, 256))
    refused("row_order", source("codes", good, 8, 256, order=np.arange(1, 9, dtype=np.int32)))
    refused(
        "columns, wanted 256",
        source("codes", good, 8, 256),
        source("codes", random_codes(8, 128), 8, 128),
    )
    refused(
        "wanted one rule",
        source("codes", good, 8, 256),
        source("codes", good, 8, 256, divide=True, name="layers.0.k"),
    )
    refused("wanted at least one matrix")


def test_public_packing() -> None:
    codes = random_codes(70, 90)
    for bits in BITS:
        weight = bx.PackedTernary.pack(codes, 0.5, bits)
        assert (weight.shape, weight.scale, weight.bits) == ((70, 90), 0.5, bits)
        np.testing.assert_array_equal(weight.unpack(), codes)
    assert bx.PackedTernary.pack(codes, 0.5, "2").nbytes == 128 * 96 // 4 + 70 * 4
    assert bx.PackedTernary.pack(codes, 0.5, "1.6").nbytes == 128 * 100 // 5 + 70 * 4
    np.testing.assert_array_equal(bx.PackedTernary.pack(codes.T, 1).unpack(), codes.T)
    each = np.linspace(0.1, 1, 70, dtype=np.float32)
    np.testing.assert_array_equal(bx.PackedTernary.pack(codes, each).scale, each)
    for matrix, scale, bits, match in (
        (codes * 2, 1.0, "2", "a weight other than -1, 0 and 1"),
        (codes.astype(np.int16), 1.0, "2", "wanted int8"),
        (codes[0], 1.0, "2", "wanted int8"),
        (codes, 0.0, "2", "scale: found 0"),
        (codes, np.nan, "2", "scale: found"),
        (codes, each[:-1], "2", r"wanted a number or \[70\]"),
        (codes, 1.0, "3", "bits: found '3', wanted '2' or '1.6'"),
    ):
        with pytest.raises(InvalidShapeError, match=match):
            bx.PackedTernary.pack(matrix, scale, bits)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from([kind for kind in formats.KINDS if kind not in ("f32", "f16", "bf16")]),
    bits=st.sampled_from(BITS),
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    k=st.integers(1, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_packing_round_trips(kind: str, bits: str, rows: list[int], k: int, seed: int) -> None:
    """Stacked sources of one kind, panels and their borders anywhere, rows in any order."""
    unit = {"tq1_0": 256, "tq2_0": 256, "i2_s": 32, "i2_s_arm": 16}.get(kind, 17)
    k *= unit
    rng = np.random.default_rng(seed)
    sources, parts = [], []
    for n in rows:
        n = 4 * n if kind != "codes" else n
        codes = rng.integers(-1, 2, (n, k), np.int8)
        order = rng.permutation(n).astype(np.int32)
        sources.append(source(kind, formats.encode(kind, codes, 1.0), n, k, order=order))
        parts.append(codes[order])
    weight = _core.PackedTernary.from_sources(sources, bits)
    expected = np.concatenate(parts)
    assert weight.shape == expected.shape
    np.testing.assert_array_equal(weight.unpack(), expected)
    q = rng.integers(-128, 128, (3, k)).astype(np.int8)
    np.testing.assert_array_equal(bx.ternary_matmul(q, weight), product(q, expected))
