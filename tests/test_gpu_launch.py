"""Launches of the ternary kernels at real sizes, on no device: what they cover, what they need."""

import numpy as np
import pytest
from cuda_emulator import emulator

from bitnet_ext.gpu import ternary
from bitnet_ext.gpu.compile import modules
from bitnet_ext.gpu.product import Product
from bitnet_ext.gpu.quantise import Activations, NormRows

# (n, k) of the 2B shape: q k v, o, gate and up, down.
SHAPES = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912), (1, 1)]
# Multiprocessors and shared memory of a block (KiB); 64 Ki registers everywhere.
DEVICES = {
    80: (108, 163),
    86: (84, 99),
    89: (128, 99),
    90: (132, 227),
    100: (148, 227),
    120: (170, 99),
}
TILES = {  # (outputs, tokens) of a tile, blocks that a multiprocessor holds
    "ternary_gemm<32>": (128, 32, 3),
    "ternary_gemm<64>": (128, 64, 3),
    "ternary_wgmma": (256, 128, 1),
}


class Geometry:
    """A device that notes launches; nobody touches the memory of arrays."""

    def __init__(self, capability):
        self.capability = capability
        self.processors = DEVICES[capability][0]
        self.block_memory = DEVICES[capability][1] << 10
        self.launches = []

    def empty(self, shape, dtype):
        return np.empty(shape, dtype)

    def launch(self, module, kernel, grid, block, args, shared=0):
        assert kernel in module.kernels
        self.launches.append((module, kernel, grid, block, shared))


class Weight:
    """As much of a DeviceTernary as a launch reads."""

    def __init__(self, n, k):
        self.shape, self.divide, self.words, self.scale = (n, k), False, None, None
        self.blocks = -(-k // 128)


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("rows", [1, 4, 8, 16, 17, 32, 64, 65, 128, 2048, 8192])
def test_grids_cover_and_blocks_fit(capability, rows):
    _, shared_limit = DEVICES[capability]
    for n, k in SHAPES:
        device = Geometry(capability)
        x = ternary.activations(device, rows, k)
        source = NormRows(np.zeros((rows, k), np.float32), "rms")
        p = Product(x, Weight(n, k), device.empty((rows, n), np.float32))
        ternary.norm_product(device, source, p)
        *before, (_, kernel, grid, block, shared) = device.launches
        for quantise in before:
            assert quantise[2:4] == ((rows,), (256,))
            assert quantise[4] <= shared_limit * 1024
        if kernel in TILES:
            outputs, tokens, _ = TILES[kernel]
            assert grid == (-(-n // outputs) * -(-rows // tokens),)
        elif kernel.startswith("norm_gemv"):
            outputs, tokens = 16 * int(kernel[-2]), rows
            assert len(grid) == 1
        else:
            groups, tiles = (int(v) for v in kernel[13:-1].split(","))
            outputs, tokens = 16 * tiles, 8 * groups
            assert grid[1] * tokens >= rows > (grid[1] - 1) * tokens
        if kernel not in TILES:
            # No block reads beyond the padded panels, and a large matrix fills the device.
            assert grid[0] * outputs <= -(-n // 64) * 64
            assert grid[0] >= min(device.processors, -(-n // 16))
            assert grid[0] * outputs >= n > (grid[0] - 1) * outputs
        assert len(block) == 1
        assert shared <= shared_limit * 1024


@pytest.mark.parametrize("capability", DEVICES)
@pytest.mark.parametrize("rows", [17, 32, 64, 65, 128, 512, 2048, 8192])
def test_every_multiprocessor_has_a_share(capability, rows):
    for n, k in SHAPES:
        device = Geometry(capability)
        x, split = ternary.activations(device, rows, k), ternary.split_room(device, rows)
        out = device.empty((rows, n), np.float32)
        ternary.product(device, Product(x, Weight(n, k), out, split=split))
        [(_, kernel, (grid,), _, _)] = device.launches
        outputs, tokens, resident = TILES[kernel]
        blocks_of_k = -(-k // 128)
        units = -(-n // outputs) * -(-rows // tokens) * blocks_of_k
        assert grid <= min(units, resident * device.processors)
        # All at once, and none with more than the others by more than a block of k; fewer blocks
        # only where each has but a few blocks of k.
        assert grid >= min(device.processors, units // 4)
        # A block leaves the sums of two tiles at most.
        assert split.sums.size >= 2 * grid * outputs * tokens
        assert split.tickets.size >= grid


@pytest.mark.parametrize(
    ("rows", "launches"), [(1, 4), (2, 4), (3, 5), (4, 5), (5, 8), (16, 8), (17, 8), (64, 8)]
)
def test_launches_of_the_2b_shape_s_products(rows, launches):
    """Its four products and the norms that do not stand in front of them; attention is one more."""
    device = Geometry(90)
    for n, k in SHAPES[:4]:
        room, split = ternary.activations(device, rows, k), ternary.split_room(device, rows)
        out = device.empty((rows, n), np.float32)
        p = Product(room, Weight(n, k), out, split=split)
        ternary.norm_product(device, NormRows(np.zeros((rows, k), np.float32), "rms"), p)
    assert len(device.launches) == launches
    if rows == 1:  # blocks that are all there at once, two on each multiprocessor
        assert [launch[2] for launch in device.launches] == [(240,), (160,), (216,), (160,)]


def test_few_rows_share_no_tiles():
    assert ternary.split_room(Geometry(90), 16) is None


@pytest.mark.parametrize(
    ("capability", "rows", "kernel"),
    [
        (80, 1, "norm_gemv"),
        (90, 4, "norm_gemv"),
        (90, 5, "ternary_gemv"),
        (90, 16, "ternary_gemv"),
        (90, 64, "ternary_gemm"),
        (80, 65, "ternary_gemm"),
        (90, 65, "ternary_wgmma"),
        (100, 8192, "ternary_gemm"),
    ],
)
def test_the_kernel_for_a_device_and_its_rows(capability, rows, kernel):
    device = Geometry(capability)
    x = ternary.activations(device, rows, 2560)
    assert x.tiled == (kernel == "ternary_wgmma")
    p = Product(x, Weight(2560, 2560), device.empty((rows, 2560), np.float32))
    ternary.norm_product(device, NormRows(np.zeros((rows, 2560), np.float32)), p)
    assert device.launches[-1][1].partition("<")[0] == kernel
    assert len(device.launches) == (1 if kernel == "norm_gemv" else 2)


def test_a_tile_of_the_tiled_layout_is_whole():
    device = Geometry(90)
    x = Activations.empty(device, 130, 300, True)
    assert x.q.shape == (2, 3, 128, 128)


def test_the_emulated_device_knows_the_same_limits():
    for capability, (_, shared) in DEVICES.items():
        device = emulator.EmulatedDevice(capability)
        with pytest.raises(AssertionError, match="shared memory, at most"):
            device.launch(modules()[0], "any", (1,), (32,), [], shared * 1024 + 1)
