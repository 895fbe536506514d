"""Activations of the CUDA kernel: the CPU's bits."""

import numpy as np
import pytest

from bitnet_ext import _core
from bitnet_ext.gpu.activate import activate

ODD = np.array([0, -0.0, 1e-45, -1e-40, 3e38, -3e38, np.inf, -np.inf, np.nan], np.float32)


def same_bits(found, wanted):
    assert np.array_equal(found.view(np.uint32), wanted.view(np.uint32))


@pytest.mark.parametrize("kind", ["relu2", "silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_activations(device, kind, gated):
    rng = np.random.default_rng(1)
    width = 700
    x = (rng.standard_normal((3, width * (1 + gated))) * 4).astype(np.float32)
    x[0, : len(ODD)] = ODD
    wanted = np.empty((3, width), np.float32)
    _core.elementwise(kind, x[:, :width].ravel(), wanted.ravel())
    if gated:
        with np.errstate(over="ignore", invalid="ignore"):
            wanted = wanted * x[:, width:]
    out = device.empty((3, width), np.float32)
    activate(device, device.to_device(x), out, kind, gated)
    found = device.to_host(out)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    numbers = ~np.isnan(wanted)
    same_bits(found[numbers], wanted[numbers])
