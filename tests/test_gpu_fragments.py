"""The fragment maps of the matrix instructions in NumPy: what lies in memory, put where a lane's
registers stand in the operands (mma.cuh, wgmma.cuh), has the exact product."""

import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext.gpu.attention_codes import codes
from bitnet_ext.gpu.quantise import Activations, arrange
from bitnet_ext.gpu.screen import ScreenedTop
from bitnet_ext.gpu.screen_table import ScreenTable
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.gpu.weight import DeviceTernary

RNG = np.random.default_rng(11)
LANE, BYTE = np.arange(32)[:, None], np.arange(4)
G, T = LANE // 4, LANE % 4


def left(registers):
    """A [..., 16, 32] of m16n8k32, from the four registers of 32 lanes: bytes [..., 32, 4, 4]."""
    a = np.full((*registers.shape[:-3], 16, 32), 999)
    for i in range(4):
        a[..., G + 8 * (i % 2), 4 * T + BYTE + 16 * (i // 2)] = registers[..., i, :]
    return a


def right(registers):
    """B [..., 32, 8] of m16n8k32, from the two registers of 32 lanes: bytes [..., 32, 2, 4]."""
    b = np.full((*registers.shape[:-3], 32, 8), 999)
    for i in range(2):
        b[..., 4 * T + BYTE + 16 * i, np.broadcast_to(G, (32, 4))] = registers[..., i, :]
    return b


def as_bytes(words):
    """uint8 [..., 4], a byte of each word, low ones first."""
    return np.ascontiguousarray(words)[..., None].view(np.uint8)


def matrix(n, k):
    return RNG.integers(-1, 2, (n, k), np.int8)


def ternary_words(device, weights):
    """uint32 [panels, blocks, 4, 32, 4] of a matrix, as they lie."""
    packed = bx.PackedTernary.pack(weights, 1.0)
    return device.to_host(DeviceTernary(device, packed).words)


def activations(device, q, *, tiled):
    """Rows as they lie in either layout."""
    x = Activations.empty(device, *q.shape, tiled)
    arrange(device, device.to_device(q), x)
    return device.to_host(x.q)


def check_ternary(sums, weights, q):
    """``sums`` [outputs, tokens] of codes 0, 1 and 2, up to a whole tile of both."""
    (n, _), rows = weights.shape, len(q)
    found = sums[:n, :rows] - q.sum(1, dtype=np.int64)
    assert np.array_equal(found, weights.astype(np.int64) @ q.astype(np.int64).T)


def test_a_ternary_product(device):
    """m16n8k32: a lane reads 32 bytes of its token, and words of weights by bits."""
    weights, q = matrix(70, 300), RNG.integers(-128, 128, (8, 300)).astype(np.int8)
    words = ternary_words(device, weights)
    panels, blocks = words.shape[:2]
    # [block, lane, j, h, byte]: token g, bytes 8 j + 4 h of 32 from 32 t on
    tokens = activations(device, q, tiled=False).reshape(8, blocks, 4, 4, 2, 4)
    tokens = tokens.transpose(1, 0, 2, 3, 4, 5).reshape(blocks, 32, 4, 2, 4)
    sums = np.zeros((panels, 4, 16, 8), np.int64)
    for block in range(blocks):
        for j in range(4):
            a = left(as_bytes(words[:, block]) >> 2 * j & 3)
            sums += a @ right(tokens[block, :, j])
    check_ternary(sums.reshape(64 * panels, 8), weights, q)


def swizzled(columns, k):
    """B [32, 128] of wgmma from 128 columns of 128 bytes, 16-byte chunk c of column n at
    c ^ (n % 8), from byte ``k`` on."""
    chunks = columns.reshape(128, 8, 16)
    column = np.arange(128)[:, None]
    wanted = k // 16 + np.arange(2) ^ column % 8
    return chunks[column, wanted].reshape(128, 32).T


def test_a_ternary_product_on_hopper(device):
    """m64n128k32: the fragments of four warps, and a tile of tokens as it lies in shared memory."""
    weights, q = matrix(130, 300), RNG.integers(-128, 128, (130, 300)).astype(np.int8)
    words = ternary_words(device, weights)
    panels, blocks = words.shape[:2]
    tiles = activations(device, q, tiled=True)
    sums = np.zeros((panels, len(tiles), 64, 128), np.int64)
    for block in range(blocks):
        for j in range(4):
            a = left(as_bytes(words[:, block]) >> 2 * j & 3).reshape(panels, 64, 32)
            b = np.stack([swizzled(tile[block], 32 * j) for tile in tiles])
            sums += a[:, None] @ b.astype(np.int64)
    wide = sums.transpose(0, 2, 1, 3).reshape(64 * panels, 128 * len(tiles))
    check_ternary(wide, weights, q)


def load_matrices(tile, rows, words):
    """Bytes [lane, i, 4] that ldmatrix gives: of matrix i, 16-byte word ``words[i]`` of eight rows
    from ``rows[i]`` on, of a tile [row, word, 16] whose words stand as code_tiles.cuh has them."""
    count = tile.shape[1]
    found = []
    for row, word in zip(rows, words, strict=True):
        eight = row + np.arange(8)
        at = word ^ (eight & 7 if count == 8 else eight >> 1 & 3)
        found.append(tile[eight, at].reshape(8, 4, 4).reshape(32, 4))
    return np.stack(found, 1)


@pytest.mark.parametrize("width", [64, 128])
def test_scores_of_int8_attention(device, width):
    """16 queries in registers, keys through shared memory, of vectors narrower than the tile."""
    x = RNG.standard_normal((1, 1, 80, width - 16)).astype(np.float32)
    found = device.to_host(codes(device, device.to_device(x), (1,))[0])[0, 0]
    padded = np.zeros((80, width), np.int8)
    padded[:, : width - 16] = found
    assert np.abs(found).max() == 127
    queries, keys = padded[:16], padded[16:].reshape(64, width // 16, 16)
    row, word = np.arange(64)[:, None], np.arange(width // 16)
    tile = np.empty_like(keys)
    tile[row, word ^ (row & 7 if width == 128 else row >> 1 & 3)] = keys
    sums = np.zeros((16, 64), np.int64)
    for step in range(width // 32):
        at = 32 * step + 4 * T + BYTE
        registers = [queries[G + 8 * (i % 2), at + 16 * (i // 2)] for i in range(4)]
        a = left(np.stack(registers, 1))
        for n in range(0, 64, 16):
            k = load_matrices(tile, (n, n, n + 8, n + 8), (2 * step, 2 * step + 1) * 2)
            sums[:, n : n + 8] += a @ right(k[:, :2])
            sums[:, n + 8 : n + 16] += a @ right(k[:, 2:])
    wanted = queries.astype(np.int64) @ padded[16:].astype(np.int64).T
    assert np.array_equal(sums, wanted)


def test_sums_of_the_screen(device):
    """Four bits of each code of the table, by the two pieces of four rows of hidden states."""
    vocab, width = 64, 150
    table = RNG.integers(-127, 128, (vocab, width)).astype(np.float32)
    table[:, 0] = 127  # a step of 1
    x = RNG.standard_normal((4, width), np.float32)
    held = DeviceTable.upload(device, np.pad(table, ((0, 0), (0, 10))), "f32")
    held = DeviceTable(held.data, "f32", width, None)
    screen = ScreenTable.of(device, held)
    top = ScreenedTop(device, held, None, screen, 4, 1)
    top.project(device.to_device(x), device.empty((4, vocab), np.float32))
    pieces = device.to_host(top._pieces)
    assert np.abs(pieces).max(1).min() > 100
    spans = pieces.shape[1] // 64
    words = device.to_host(screen.high).reshape(vocab // 16, spans, 32, 4)
    sums = np.zeros((vocab // 16, 16, 8), np.int64)
    for span in range(spans):
        # column g, 16 bytes from 16 t on: two registers for each j
        columns = pieces.reshape(8, spans, 4, 2, 2, 4)[:, span].reshape(32, 2, 2, 4)
        for j in range(2):
            sums += left(as_bytes(words[:, span]) >> 4 * j & 15) @ right(columns[:, j])
    high = (np.pad(table, ((0, 0), (0, 64 * spans - width))).astype(np.int64) + 128) >> 4
    assert np.array_equal(sums.reshape(vocab, 8), high @ pieces.astype(np.int64).T)
