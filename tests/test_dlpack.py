"""Arrays of other libraries: what every op takes by DLPack, and gives back as the same kind."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from dlpack_cases import calls, each, unchanged

import bitnet_ext as bx
from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.gpu import dlpack
from bitnet_ext.gpu.interchange import host_array


class Plain:
    """An array that knows DLPack and nothing else."""

    __module__ = "plain.core"

    def __init__(self, array):
        self.held = array

    def __dlpack__(self, **options):
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.held.__dlpack_device__()


class PlainChild(Plain):
    """Of a class of the user's."""

    __module__ = "somewhere.else"


class Bits(Plain):
    """bfloat16, as a library exports it that has it."""

    def __dlpack__(self, **options):
        return dlpack._Export(self.held.view(np.uint16), 1, 4).__dlpack__(**options)


def plain(monkeypatch):
    module = ModuleType("plain")
    module.from_dlpack = lambda array: Plain(host_array("result", array))
    monkeypatch.setitem(sys.modules, "plain", module)
    monkeypatch.setitem(sys.modules, "somewhere", ModuleType("somewhere"))
    return SimpleNamespace(kind=Plain, of=PlainChild, host=lambda array: array.held)


def torch(monkeypatch):
    torch = pytest.importorskip("torch")
    return SimpleNamespace(
        kind=torch.Tensor,
        of=lambda array: torch.from_numpy(np.array(array)),
        host=lambda tensor: tensor.numpy(),
    )


@pytest.fixture(params=[plain, torch], ids=lambda make: make.__name__)
def library(request, monkeypatch):
    return request.param(monkeypatch)


@pytest.mark.parametrize("name", calls(unchanged))
def test_every_op_gives_back_what_it_took(library, name):
    found, wanted = each(calls(library.of)[name]()), each(calls(unchanged)[name]())
    for array, expected in zip(found, wanted, strict=True):
        assert isinstance(array, library.kind)
        assert type(expected) is np.ndarray
        assert library.host(array).dtype == expected.dtype
        assert np.array_equal(library.host(array), expected)


def test_results_are_written_where_out_is(library):
    out = library.of(np.ones((3, 5), np.float32))
    assert bx.create_causal_mask(3, 5, out=out) is out
    assert np.array_equal(library.host(out), bx.create_causal_mask(3, 5))
    out = library.of(np.ones((2, 3, 5), bool))
    assert bx.create_batch_causal_mask([3, 2], [5, 4], dtype="bool", out=out) is out
    wanted = bx.create_batch_causal_mask([3, 2], [5, 4], dtype="bool")
    assert np.array_equal(library.host(out), wanted)
    model = bx.BitNetModel.random(bx.BitNetConfig.tiny(), 3)
    logits = library.of(np.empty((4, model.config.vocab_size), np.float32))
    ids = np.arange(4)
    assert model.forward_full(library.of(ids), out=logits) is logits
    assert np.array_equal(library.host(logits), model.forward_full(ids))
    mha = bx.MultiHeadAttention(4, 1)
    mha.load_state_dict({n: np.eye(4, dtype=np.float32)[None] for n in mha._shapes()})
    x, out = np.ones((2, 3, 4), np.float32), library.of(np.empty((2, 3, 4), np.float32))
    assert mha(x, out=out) is out
    assert np.array_equal(library.host(out), mha(x))


def test_a_read_only_out_is_refused(monkeypatch):
    library, fixed = plain(monkeypatch), np.zeros((1, 2, 4), np.float32)
    fixed.flags.writeable = False
    out, mha = library.of(fixed), bx.MultiHeadAttention(4, 1)
    mha.load_state_dict({n: np.eye(4, dtype=np.float32)[None] for n in mha._shapes()})
    with pytest.raises(InvalidShapeError, match=r"out: found .* read-only"):
        mha(np.ones((1, 2, 4), np.float32), out=out)
    with pytest.raises(InvalidShapeError, match="writable"):
        bx.create_batch_causal_mask([2], [4], out=out)


def test_a_library_that_takes_nothing_is_refused_before_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "plain", ModuleType("plain"))
    q = Plain(np.ones((1, 2, 3, 4), np.float32))
    with (
        bx.DispatchMetrics() as metrics,
        pytest.raises(InvalidShapeError, match="q: found Plain"),
    ):
        bx.attention(q, q, q)
    assert not metrics.as_dict()


def test_arrays_of_jax_go_back_by_its_own_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "jaxlib", ModuleType("jaxlib"))
    module = ModuleType("jax.dlpack")
    module.from_dlpack = lambda array: Plain(host_array("result", array))
    monkeypatch.setitem(sys.modules, "jax", ModuleType("jax"))
    monkeypatch.setitem(sys.modules, "jax.dlpack", module)
    kind = type("ArrayImpl", (Plain,), {"__module__": "jaxlib._jax"})
    found = bx.rms_norm(kind(np.ones((2, 8), np.float32)), None)
    assert type(found) is Plain


def test_bfloat16(library):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    arrays = np.random.default_rng(0).standard_normal((3, 1, 2, 5, 8)).astype(bfloat16)
    if library.kind is Plain:
        q, k, v = (Bits(a) for a in arrays)
    else:
        wide = (library.of(a.astype(np.float32)) for a in arrays)
        q, k, v = (a.bfloat16() for a in wide)
    found, wanted = bx.attention(q, k, v), bx.attention(*arrays)
    if library.kind is Plain:
        assert np.array_equal(found.held.view(np.uint16), wanted.view(np.uint16))
    else:
        assert found.dtype == q.dtype
        assert np.array_equal(found.float().numpy(), wanted.astype(np.float32))
    with pytest.raises(InvalidShapeError, match="x: found bfloat16"):
        bx.rms_norm(q, None)


def test_what_a_library_does_not_export_is_named(monkeypatch):
    library = plain(monkeypatch)
    x = library.of(np.ones((2, 8), np.float32))
    monkeypatch.setattr(Plain, "__dlpack__", lambda *_, **__: refuse())
    for call in (lambda: bx.rms_norm(x, None), lambda: bx.attention(x, x, x)):
        with pytest.raises(InvalidShapeError, match=r"found PlainChild \(requires a gradient\)"):
            call()


def test_an_array_that_is_nowhere_is_named(monkeypatch):
    """As torch's on its device "meta"."""
    library = plain(monkeypatch)
    x = library.of(np.ones((2, 8), np.float32))
    for method in ("__dlpack__", "__dlpack_device__"):
        monkeypatch.setattr(Plain, method, lambda *_, **__: refuse())
    with pytest.raises(InvalidShapeError, match="x: found PlainChild"):
        bx.rms_norm(x, None)


def test_what_torch_does_not_export_is_named(monkeypatch):
    library = torch(monkeypatch)
    x = library.of(np.ones((2, 8), np.float32))
    for bad, why in (
        (x.clone().requires_grad_(), "gradient"),
        (x.to_sparse(), "layout"),
        (x.to("meta"), "meta"),
    ):
        with pytest.raises(InvalidShapeError, match=rf"x: found Tensor \(.*{why}"):
            bx.rms_norm(bad, None)


def refuse():
    raise BufferError("requires a gradient")
