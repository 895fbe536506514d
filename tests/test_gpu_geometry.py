"""Every launch of the package at the sizes of the 2B shape, on no device, beside the machine code:
shared memory, registers and threads of a block are what each architecture has."""

import dataclasses
import functools
import itertools
import math

import ml_dtypes
import numpy as np
import nvrtc
import pytest
from cuda_emulator.emulator import BLOCK_MEMORY
from idle_device import IdleDevice

import bitnet_ext as bx
import bitnet_ext.gpu.device
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu.activate import activate
from bitnet_ext.gpu.attend import attend_step
from bitnet_ext.gpu.compile import modules
from bitnet_ext.gpu.embed import embed
from bitnet_ext.gpu.kv_append import advance
from bitnet_ext.gpu.kv_cache import DeviceCache, DeviceRows
from bitnet_ext.gpu.logprob import gather_logprobs
from bitnet_ext.gpu.product import Product
from bitnet_ext.gpu.project import project
from bitnet_ext.gpu.quantise import KINDS, Activations, NormRows, arrange, norm_quantise
from bitnet_ext.gpu.sample import Choice, DeviceSampler
from bitnet_ext.gpu.screen import ScreenedTop
from bitnet_ext.gpu.screen_table import SCREENED, ScreenTable
from bitnet_ext.gpu.tables import DeviceTable
from bitnet_ext.gpu.ternary import device_weight, norm_product
from bitnet_ext.gpu.topk import MOST_LARGEST, TopK
from bitnet_ext.model.device_layers import DeviceLayer, Intermediates
from bitnet_ext.model.load import RandomWeights, load_weights
from bitnet_ext.ops.norms import layer_norm_backward, rms_norm_backward

PROCESSORS = {80: 108, 86: 84, 89: 128, 90: 132, 100: 148, 120: 170}
REGISTERS, PLAIN_SHARED = 65536, 48 << 10
NORMS = ((bx.rms_norm, rms_norm_backward), (bx.layer_norm, layer_norm_backward))
PRECISIONS, CACHES = ("f32", "f16", "bf16"), ("f32", "f16", "int8")
TABLES = {"f32": np.float32, "f16": np.float16, "bf16": np.uint16, "int8": np.int8}

WIDE = bx.BitNetConfig.bitnet_2b_4t()
GPT2 = dataclasses.replace(bx.BitNetConfig.gpt2_medium(), hidden_act="gelu")


@functools.cache
def host_layer(config):
    small = dataclasses.replace(config, num_layers=1, vocab_size=1)
    return load_weights(RandomWeights(small)).layers[0]


def layers(device):
    """Prefill and decode of one sequence and of 64, in every precision, over every cache."""
    for config, precision in itertools.product((WIDE, GPT2), PRECISIONS):
        layer = DeviceLayer(device, config, host_layer(config), precision)
        sizes = config.num_kv_heads, config.head_dim, config.head_dim
        for kv_dtype, batch in itertools.product(CACHES, (1, 64)):
            cache = DeviceCache(device, 1, batch, *sizes, 4096, kv_dtype)
            step = Intermediates(device, config, batch, cache)
            layer.run(step, cache, 0, DeviceRows.one_each(batch), (None, None))
            for each in (1, 2048 // batch):
                rows = DeviceRows.ragged(device, [each] * batch)
                block = Intermediates(device, config, rows.count)
                layer.run(block, cache, 0, rows, (None, None))
                advance(cache, rows)


def wide_heads(device):
    """Steps over heads so wide that shared memory holds fewer keys at a time."""
    for kv_dtype, size in [("f32", 600), ("f16", 1600), ("int8", 2048)]:
        wide_step(device, kv_dtype, size)


def wide_step(device, kv_dtype, size):
    cache = DeviceCache(device, 1, 1, 2, size, size, 4096, kv_dtype)
    qkv, out = (device.empty((1, n * size), np.float32) for n in (12, 8))
    attend_step(cache, 0, qkv, DeviceRows.one_each(1), out, scale=1.0)


def products(device):
    """Every number of rows that has a kernel of its own, on the widest matrices and small ones."""
    for n, k in [(13824, 2560), (2560, 6912), (4096, 1024), (16, 128)]:
        weight = bx.PackedTernary.pack(np.zeros((n, k), np.int8), 1.0)
        device_weight(device, weight).unpack()
        for rows in (1, 4, 5, 16, 17, 64, 65, 2048):
            bx.ternary_linear(device.empty((rows, k), np.float32), weight)
            bx.ternary_matmul(device.empty((rows, k), np.int8), weight)
        for kind, rows in itertools.product(KINDS, (1, 4)):
            x, room = NormRows(device.empty((rows, k), np.float32), kind), Activations.empty
            p = Product(room(device, rows, k, False), device_weight(device, weight), x.rows)
            norm_product(device, x, p)
    for kind, tiled in itertools.product(KINDS, (False, True)):
        room = Activations.empty(device, 130, 25_000, tiled)
        norm_quantise(device, NormRows(device.empty((130, 25_000), np.float32), kind), room)
        arrange(device, device.empty((130, 25_000), np.int8), room)


def vocabulary(device):
    """128,256 rows of every type, for one row of hidden states to 64."""
    vocab, width = WIDE.vocab_size, WIDE.hidden_size
    for dtype, kind in TABLES.items():
        scales = device.empty((vocab,), np.float32) if dtype == "int8" else None
        table = DeviceTable(device.empty((vocab, width), kind), dtype, width, scales)
        screen = ScreenTable.of(device, table) if dtype in SCREENED else None
        for rows in (1, 2, 4, 8, 16, 17, 64):
            x, out = (device.empty((rows, n), np.float32) for n in (width, vocab))
            embed(device, table, device.empty((rows,), np.int32), x)
            project(device, x, table, None, out)
            if screen is not None:
                ScreenedTop(device, table, None, screen, rows, 50).project(x, out)
    TopK(device, 64, vocab, MOST_LARGEST).find(out)
    ids, ends = device.empty((64,), np.int32), device.empty((64,), np.bool_)
    gather_logprobs(device, out, ids, out[:, 0], ends)
    for choice in (Choice(True), Choice(False, top_k=50, top_p=0.9)):
        DeviceSampler(device, 64, vocab, choice).choose(out, ids, ids)


def arrays(device):
    """Attention and its gradients over arrays, few queries and many, narrow heads and wide."""
    dtypes = (np.float32, np.float16, ml_dtypes.bfloat16)
    for tq, width, dtype in itertools.product((1, 600), (64, 128, 300), dtypes):
        q = device.empty((1, 8, tq, width), dtype)
        k = device.empty((1, 2, 4096, width), dtype)
        odd = device.empty((1, 2, 4096, width + 1), dtype)[..., 1:]
        for precision, keys in itertools.product(("f32", "int8", "f16", "bf16"), (k, odd)):
            bx.attention(q, keys, keys, causal=True, precision=precision)
        bx.attention(q, k, k, softcap=30.0, return_scores="raw")
        for keys in (k, k[:, :, :8]):
            bx.attention_backward(q, q, keys, keys)


def rows_and_masks(device):
    """Norms and rotations of long rows, activations, multi-head training, and masks."""
    for width in (2560, 25_300, 100_000):
        x, w = device.empty((64, width), np.float32), device.empty((width,), np.float32)
        for norm, backward in NORMS:
            norm(x, w)
            backward(x, x, w)
    angles = device.empty((64, 4096, 64), np.float32)
    bx.rotary_embedding(device.empty((64, 20, 4096, 128), np.float32), angles, angles)
    for kind in ("relu2", "silu", "gelu", "gelu_tanh"):
        activate(device, x, device.empty((64, 50_000), np.float32), kind, True)
    mha = bx.MultiHeadAttention(1024, 16)
    names = ("w_q", "w_k", "w_v", "w_out")
    mha.load_state_dict({name: np.zeros((16, 64, 1024), np.float32) for name in names})
    y = mha(device.empty((2, 300, 1024), np.float32), training=True)
    mha.backward(y)
    for dtype in ("float32", "float16", "bool"):
        bx.create_causal_mask(16384, 16384, dtype=dtype, device="cuda")


@functools.cache
def launches(capability):
    """(module, kernel, grid, block, dynamic shared memory) of all these calls, on such a device."""
    device = IdleDevice(capability, PROCESSORS[capability])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bitnet_ext.gpu.device, "cuda_device", lambda: device)
        for calls in (layers, wide_heads, products, vocabulary, arrays, rows_and_masks):
            calls(device)
    return set(device.noted)


@pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))
@pytest.mark.parametrize("capability", PROCESSORS)
def test_every_launch_fits_its_device(capability):
    arch = "90a" if capability == 90 else str(capability)
    for module, kernel, grid, block, shared in launches(capability):
        assert module.arch in (None, f"sm_{arch}")
        found, threads = nvrtc.compile_module(module, arch).usage[kernel], math.prod(block)
        where = module.file, kernel, grid, block, shared
        assert found.static_shared <= PLAIN_SHARED, where
        assert found.static_shared + shared <= BLOCK_MEMORY[capability], where
        assert -(-found.registers // 8) * 8 * -(-threads // 32) * 32 <= REGISTERS, where
        assert threads <= found.most_threads, where


def test_every_kernel_is_among_them():
    launched = {(module.file, kernel) for c in PROCESSORS for module, kernel, *_ in launches(c)}
    assert launched == {(module.file, kernel) for module in modules() for kernel in module.kernels}


def test_heads_that_no_block_has_the_memory_for():
    wide_step(IdleDevice(90, 132), "f32", 2048)
    with pytest.raises(InvalidShapeError, match=r"found heads of 2048.* wanted at most 99328"):
        wide_step(IdleDevice(86, 84), "f32", 2048)
