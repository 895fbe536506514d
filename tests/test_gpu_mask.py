"""Masks of the CUDA kernel against the CPU's."""

import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError

DTYPES = ["float32", "float16", "bool"]


def same(device, call):
    """``call(device=...)`` gives the same mask on both."""
    mask, wanted = call(device="cuda"), call(device="cpu")
    assert device.owns(mask)
    assert mask.dtype == wanted.dtype
    assert np.array_equal(device.to_host(mask), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width(device, dtype):
    for k_len in [*range(0, 40), 63, 64, 65, 127, 130]:
        for past in (0, 1, 31, 100):
            same(
                device,
                lambda device, k=k_len, past=past: bx.create_causal_mask(
                    9, k, past, window=(20, 0), prefix=3, dtype=dtype, device=device
                ),
            )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"past_len": 0},
        {"past_len": 10_000_000_000},
        {"past_len": 7, "window": (0, 0)},
        {"past_len": 40, "window": (30, -1), "prefix": 5},
        {"past_len": 2, "prefix": 1000},
    ],
)
def test_patterns(device, dtype, options):
    for q_len, k_len in [(0, 5), (5, 0), (1, 1), (17, 33), (40, 700), (3, 9000)]:
        same(
            device,
            lambda device, q=q_len, k=k_len: bx.create_causal_mask(
                q, k, dtype=dtype, device=device, **options
            ),
        )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_anywhere_are_filled_alone(device, dtype):
    for first in range(20):
        whole = device.to_device(np.ones((6, 100), dtype))
        out = whole[::2, first : first + 37]
        options = {"window": (9, 0), "prefix": 2, "dtype": dtype}
        assert bx.create_causal_mask(3, 37, 20, device="cuda", out=out, **options) is out
        wanted = np.ones((6, 100), dtype)
        bx.create_causal_mask(3, 37, 20, out=wanted[::2, first : first + 37], **options)
        assert np.array_equal(device.to_host(whole), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batches_and_streams(device, dtype):
    options = {"window": (3, -1), "prefix": 1, "dtype": dtype}
    same(
        device,
        lambda device: bx.create_batch_causal_mask(
            [3, 0, 5], [7, 4, 5], [4, 0, 2], device=device, **options
        ),
    )
    parts = list(bx.iter_causal_mask(50, 60, 16, device="cuda", **options))
    assert [len(part) for part in parts] == [16, 16, 16, 2]
    rows = np.concatenate([device.to_host(part) for part in parts])
    assert np.array_equal(rows, bx.create_causal_mask(50, 60, **options))


def test_cache_keeps_devices_apart(device, monkeypatch):
    cache = bx.MaskCache()
    first = cache.get(4, 6, device="cuda")
    assert device.owns(first)
    assert cache.get(4, 6, device="cuda") is first
    assert cache.get(4, 6) is not first
    monkeypatch.setattr(device, "number", device.number + 1)
    assert cache.get(4, 6, device="cuda") is not first
    assert (cache.hits, cache.misses) == (1, 3)


def test_an_out_that_does_not_fit(device):
    for bad in (
        np.empty((2, 3), np.float32),
        device.empty((2, 4), "float32"),
        device.empty((2, 3), "float16"),
        device.empty((3, 2), "float32").T,
    ):
        with pytest.raises(InvalidShapeError, match="out: found"):
            bx.create_causal_mask(2, 3, device="cuda", out=bad)
