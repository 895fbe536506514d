"""Sums of outer products of the CUDA kernels: the CPU's bits."""

import numpy as np
import pytest
from attention_cases import same_bits

from bitnet_ext import _core
from bitnet_ext.gpu.sum_products import sum_products


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def check(device, a, b, start):
    wanted = start.copy()
    _core.sum_products(a, b, wanted)
    out = device.to_device(start)
    sum_products(device, device.to_device(a), device.to_device(b), out)
    assert same_bits([device.to_host(out)], [wanted])
    turned = device.to_device(start)
    sum_products(device, device.to_device(np.ascontiguousarray(a.T)).T, device.to_device(b), turned)
    assert same_bits([device.to_host(turned)], [wanted])


@pytest.mark.parametrize(
    "shape", [(0, 3, 4), (1, 1, 1), (5, 7, 15), (16, 64, 128), (33, 65, 130), (40, 3, 260)]
)
def test_sums_have_the_bits_of_the_cpu(device, shape):
    terms, outputs, width = shape
    check(device, normal(terms, outputs), normal(terms, width), normal(outputs, width, seed=2))


def test_odd_numbers(device):
    """Subnormals are kept, -0 stays -0, and nothing that is not there is multiplied."""
    a, b, start = normal(17, 9), normal(17, 20), normal(9, 20, seed=2)
    a[:, 2] *= np.float32(1e-38)
    a[:, 3], start[3] = 0.0, -0.0
    b[:, 5] = -b[:, 5] * np.float32(1e-30)
    a[3, 4], b[2, 6], a[5, 7] = np.inf, np.inf, np.nan
    with np.errstate(invalid="ignore"):
        check(device, a, b, start)


def test_rows_of_larger_arrays(device):
    a, b, start = normal(20, 40), normal(20, 30), normal(50, 30, seed=2)
    wanted = start.copy()
    _core.sum_products(a[:, 3:9], b[:, 2:20], wanted[4:10, 5:23])
    out = device.to_device(start)
    arrays = device.to_device(a)[:, 3:9], device.to_device(b)[:, 2:20]
    sum_products(device, *arrays, out[4:10, 5:23])
    assert same_bits([device.to_host(out)], [wanted])
