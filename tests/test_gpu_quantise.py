"""Rows quantised on a device: the CPU's bits, the sums, both layouts."""

import numpy as np
import pytest

from bitnet_ext import _core
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.quantise import Activations, NormRows, arrange, norm_quantise

RNG = np.random.default_rng(5)


def plain(q, rows, k):
    """int8 [rows, k] out of either layout; the rest must be zero."""
    if q.ndim == 4:
        # [row / 128][k / 128][row % 128][chunk, 16 bytes]; chunk c at c ^ (row % 8), k by fragment
        tiles, blocks = q.shape[:2]
        chunks = q.reshape(tiles, blocks, 128, 8, 16)
        row = np.arange(128)[:, None]
        chunks = chunks[:, :, row, np.arange(8) ^ (row % 8)]
        # chunk 2 j + h, bytes 4 t..: k = 32 t + 8 j + 4 h
        words = chunks.reshape(tiles, blocks, 128, 4, 2, 4, 4)
        q = words.transpose(0, 2, 1, 5, 3, 4, 6).reshape(tiles * 128, blocks * 128)
    assert (q[:rows, k:] == 0).all()
    return q[:rows, :k]


def cpu(x, kind, weight, bias, eps):
    q, s = np.empty(x.shape, np.int8), np.empty(len(x), np.float32)
    _core.norm_quant(np.ascontiguousarray(x), weight, bias, eps, kind, q, s)
    return q, s


def same(device, x, kind="none", weight=None, bias=None, eps=0.0):
    rows, k = x.shape
    wanted, scales = cpu(x, kind, weight, bias, eps)
    placed = [None if v is None else device.to_device(v) for v in (weight, bias)]
    for tiled in (False, True):
        out = Activations.empty(device, rows, k, tiled)
        norm_quantise(device, NormRows(device.to_device(x), kind, *placed, eps), out)
        assert np.array_equal(plain(device.to_host(out.q), rows, k), wanted)
        assert np.array_equal(device.to_host(out.scales), scales, equal_nan=True)
        assert np.array_equal(device.to_host(out.sums), wanted.sum(1, dtype=np.int32))


@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
@pytest.mark.parametrize("k", [1, 5, 16, 17, 100, 128, 129, 700])
def test_every_width(device, kind, k):
    x = (RNG.standard_normal((3, k)) * [[1], [1e-3], [300]]).astype(np.float32)
    weight, bias = (RNG.standard_normal(k).astype(np.float32) for _ in range(2))
    same(device, x, kind, eps=1e-5)
    if kind != "none":
        same(device, x, kind, weight, eps=1e-5)
        same(device, x, kind, weight, bias, eps=1e-5)


@pytest.mark.parametrize("kind", ["none", "rms", "layer"])
def test_special_rows(device, kind):
    x = RNG.standard_normal((9, 70)).astype(np.float32)
    x[0], x[1], x[2] = 0, 1e-40, -3e-6
    x[3, 5], x[4, 69], x[5, 0] = np.nan, np.inf, -np.inf
    x[6] = np.resize([0.5, 1.5, -2.5, 127, -127], 70)
    x[7] = 3e38
    same(device, x, kind, eps=1e-6)
    same(device, x, kind, eps=0.0)


def test_many_rows(device):
    same(device, RNG.standard_normal((130, 40)).astype(np.float32), "rms", eps=1e-5)
    same(device, RNG.standard_normal((0, 40)).astype(np.float32))


def test_rows_at_any_distance(device):
    x = device.to_device(RNG.standard_normal((4, 90)).astype(np.float32))
    part = x[::2, 3:60]
    out = Activations.empty(device, 2, 57, False)
    norm_quantise(device, NormRows(part), out)
    wanted, scales = cpu(device.to_host(x)[::2, 3:60], "none", None, None, 0.0)
    assert np.array_equal(plain(device.to_host(out.q), 2, 57), wanted)
    assert np.array_equal(device.to_host(out.scales), scales)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 130), (129, 260)])
def test_integers_are_arranged(device, shape):
    q = RNG.integers(-128, 128, shape).astype(np.int8)
    for tiled in (False, True):
        out = Activations.empty(device, *shape, tiled)
        arrange(device, device.to_device(q), out)
        assert np.array_equal(plain(device.to_host(out.q), *shape), q)
        assert np.array_equal(device.to_host(out.sums), q.sum(1, dtype=np.int32))


def test_rows_too_long_for_shared_memory(device):
    out = Activations.empty(device, 1, 30_000, False)
    with pytest.raises(InvalidShapeError, match="rows of 30000, wanted at most"):
        norm_quantise(device, NormRows(device.to_device(np.zeros((1, 30_000), np.float32))), out)
