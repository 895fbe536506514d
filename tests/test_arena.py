"""Counted memory: current, peak, limit, and what a refused buffer leaves behind."""

import gc

import fresh
import numpy as np
import pytest

import bitnet_ext as bx
from bitnet_ext import _core
from bitnet_ext.memory.workspace import empty_array

PAGE, LINE = 4096, 64


@pytest.fixture(autouse=True)
def no_limit_afterwards() -> object:
    gc.collect()
    yield
    bx.set_memory_limit(None)


@pytest.mark.parametrize(
    ("asked", "given"), [(1, LINE), (64, LINE), (65, 2 * LINE), (PAGE, PAGE), (PAGE + 1, 2 * PAGE)]
)
def test_buffers_are_whole_lines_and_pages_of_zeros(asked: int, given: int) -> None:
    before = bx.memory_stats().current
    buffer = _core.Buffer(asked)
    view = np.frombuffer(memoryview(buffer), np.uint8)
    assert buffer.nbytes == view.nbytes == given
    assert bx.memory_stats().current == before + given
    assert view.ctypes.data % (PAGE if asked >= PAGE else LINE) == 0
    assert not view.any()
    view[:] = 255
    del view, buffer
    assert bx.memory_stats().current == before


def test_an_array_keeps_its_buffer() -> None:
    before = bx.memory_stats().current
    array = empty_array((3, 1000), np.int32)
    array[:] = 7
    row = array[1]
    del array
    assert bx.memory_stats().current == before + 3 * PAGE
    assert (row == 7).all()
    del row
    assert bx.memory_stats().current == before


def test_empty_buffer() -> None:
    before = bx.memory_stats().current
    assert _core.Buffer(0).nbytes == 0
    assert empty_array((0, 5)).shape == (0, 5)
    assert bx.memory_stats().current == before


def test_peak_is_kept_until_reset() -> None:
    bx.reset_peak_memory()
    before = bx.memory_stats()
    assert before.peak == before.current
    large = _core.Buffer(10 * PAGE)
    del large
    small = _core.Buffer(PAGE)
    after = bx.memory_stats()
    assert after.peak == before.current + 10 * PAGE
    assert after.current == before.current + PAGE
    bx.reset_peak_memory()
    assert bx.memory_stats().peak == after.current
    del small


def test_limit_refuses_and_changes_nothing() -> None:
    before = bx.memory_stats()
    bx.set_memory_limit(before.current + 4 * PAGE)
    assert bx.memory_stats().limit == before.current + 4 * PAGE
    held = _core.Buffer(4 * PAGE)
    bx.reset_peak_memory()
    with pytest.raises(MemoryError):
        _core.Buffer(1)
    now = bx.memory_stats()
    assert now.current == now.peak == before.current + 4 * PAGE
    del held
    _core.Buffer(4 * PAGE)


@pytest.mark.parametrize("lifted", [None, 0])
def test_limit_is_lifted(lifted: int | None) -> None:
    bx.set_memory_limit(1)
    with pytest.raises(MemoryError):
        _core.Buffer(PAGE)
    bx.set_memory_limit(lifted)
    assert bx.memory_stats().limit is None
    _core.Buffer(PAGE)


@pytest.mark.parametrize("size", [2**62, 2**63 + 5, 2**64 - 1])
def test_absurd_size_is_refused(size: int) -> None:
    before = bx.memory_stats()
    with pytest.raises(MemoryError):
        _core.Buffer(size)
    assert bx.memory_stats() == before


@pytest.mark.parametrize("wrong", [-1, 1.5, "1G"])
def test_wrong_limit(wrong: object) -> None:
    bx.set_memory_limit(2**40)
    with pytest.raises(ValueError, match=r"bytes: found .*, wanted None or a non-negative integer"):
        bx.set_memory_limit(wrong)  # type: ignore[arg-type]
    assert bx.memory_stats().limit == 2**40


def test_other_devices_are_unavailable() -> None:
    for call in (bx.memory_stats, lambda device: bx.set_memory_limit(1, device)):
        with pytest.raises(bx.errors.DeviceUnavailableError, match="device: found 'tpu'"):
            call("tpu")


def test_limit_from_the_environment() -> None:
    code = "import bitnet_ext as bx; print(bx.memory_stats().limit)"
    assert fresh.output(code, BITNET_MEMORY_LIMIT="123456789") == "123456789"
    assert fresh.output(code, BITNET_MEMORY_LIMIT="-5") == "None"
    assert fresh.output(code) == "None"


def test_an_unreadable_limit_stops_the_first_allocation() -> None:
    code = "import bitnet_ext as bx; bx.BitNetModel.random(bx.BitNetConfig.tiny())"
    done = fresh.run(code, BITNET_MEMORY_LIMIT="2G")
    assert done.returncode == 1
    assert "BITNET_MEMORY_LIMIT: found '2G', wanted a number of bytes" in done.stderr
