"""Embedding rows and the vocabulary projection of the CUDA kernels: the CPU's bits."""

import numpy as np
import pytest
from cuda_emulator.emulator import EmulatedDevice

from bitnet_ext import _core
from bitnet_ext.gpu.embed import embed
from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.tables import DeviceTable

DTYPES = ["f32", "f16", "bf16", "int8"]


def stored(values, dtype):
    """float32 ``values`` as a table of ``dtype`` and its row scales."""
    if dtype == "f32":
        return values, None
    if dtype == "f16":
        return values.astype(np.float16).view(np.uint16), None
    if dtype == "bf16":
        return (values.view(np.uint32) >> 16).astype(np.uint16), None
    return _core.quantise_head(values, "f32")


def same_bits(found, wanted):
    assert found.shape == wanted.shape
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


def check(device, x, values, dtype, bias=None):
    data, scales = stored(values, dtype)
    wanted = np.empty((len(x), len(values)), np.float32)
    _core.project(x, data, dtype, scales, bias, wanted)
    out = device.empty(wanted.shape, np.float32)
    table = DeviceTable.upload(device, data, dtype, scales)
    project(
        device, device.to_device(x), table, None if bias is None else device.to_device(bias), out
    )
    same_bits(device.to_host(out), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "vocab", "width"),
    [
        (1, 1, 1), (1, 70, 17), (1, 130, 300), (2, 129, 64), (3, 65, 80), (5, 200, 257),
        (9, 3, 16), (17, 1, 1), (17, 65, 48), (33, 130, 70), (64, 5, 257),
    ],
)  # fmt: skip
def test_projection_has_the_bits_of_the_cpu(device, dtype, rows, vocab, width):
    rng = np.random.default_rng([rows, vocab, width])
    x = rng.standard_normal((rows, width), np.float32)
    values = rng.standard_normal((vocab, width), np.float32)
    check(device, x, values, dtype)
    check(device, x, values, dtype, rng.standard_normal(vocab, np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_odd_numbers(device, dtype):
    """Subnormals are kept, -0 is -0, infinities and NaN come out as one NaN."""
    rng = np.random.default_rng(5)
    values = rng.standard_normal((70, 40), np.float32)
    tiny = (values * np.float32(1e-3)).copy()
    x = rng.standard_normal((7, 40), np.float32)
    x[0] *= np.float32(1e-38)
    x[1] = -1e-45
    x[2, 3], x[3, 3], x[4, 39] = np.inf, -np.inf, np.nan
    x[5], x[6] = 0, -0.0
    check(device, x, tiny, dtype)
    check(device, np.repeat(x, 3, 0), tiny, dtype)  # by the kernel of many rows
    if dtype != "int8":
        values[1, 5], values[2, 6], values[69, 7] = np.inf, np.nan, -0.0
        check(device, x, values, dtype)
        check(device, np.repeat(x, 3, 0), values, dtype)


@pytest.mark.parametrize("rows", [3, 20])
def test_a_residual_is_added_last_and_rows_may_be_left_alone(device, rows):
    rng = np.random.default_rng(rows)
    x, values = (rng.standard_normal((n, 40), np.float32) for n in (rows, 70))
    start, active = rng.standard_normal((rows, 70), np.float32), rng.random(rows) < 0.5
    plain = np.empty((rows, 70), np.float32)
    _core.project(x, values, "f32", None, None, plain)
    out, residual = device.to_device(start), device.to_device(start)
    table = DeviceTable.upload(device, values, "f32")
    project(device, device.to_device(x), table, None, out, device.to_device(active), residual)
    same_bits(device.to_host(out), np.where(active[:, None], plain + start, start))
    project(device, device.to_device(x), table, None, residual, None, residual)
    same_bits(device.to_host(residual), plain + start)


def test_every_tile_fits_the_shared_memory_of_every_card(device):
    """The emulator refuses what the smallest, 99 KB of compute capability 8.6, would."""
    if isinstance(device, EmulatedDevice):
        device.capability = 86
    for dtype in DTYPES:
        for rows in (1, 2, 4, 17):
            check(device, np.ones((rows, 20), np.float32), np.ones((5, 20), np.float32), dtype)


def test_no_rows_at_all(device):
    check(device, np.zeros((0, 20), np.float32), np.ones((5, 20), np.float32), "f32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 37, 300])
def test_embedding_rows(device, dtype, width):
    rng = np.random.default_rng(width)
    data, scales = stored(rng.standard_normal((50, width), np.float32), dtype)
    ids = np.array([49, 0, 7, 7], np.int32)
    at = np.array([2, 0, 5, 2], np.int32)
    positions = rng.standard_normal((6, width), np.float32)
    table = DeviceTable.upload(device, data, dtype, scales)
    out = device.empty((4, width), np.float32)

    wanted = np.empty((4, width), np.float32)
    _core.embed(data, dtype, ids, wanted)
    embed(device, table, device.to_device(ids), out)
    same_bits(device.to_host(out), wanted)

    _core.add_rows(wanted, positions, at)
    embed(
        device,
        table,
        device.to_device(ids),
        out,
        device.to_device(positions),
        device.to_device(at),
    )
    same_bits(device.to_host(out), wanted)
