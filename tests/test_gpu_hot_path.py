"""The guard of the hot path against CuPy: on a card, and against a stand-in."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
from cuda_emulator.emulator import EmulatedDevice
from hot_path import TheHost, hot, refused

import bitnet_ext.gpu.device
from bitnet_ext.errors import DeviceUnavailableError


class Refused(AssertionError):
    """The guard's."""


def refuse(*_, **__):
    raise Refused


class FakeCupy:
    """As much of CuPy as the guard names."""

    def __init__(self):
        class Array:
            def get(self):
                return 5

            set = item = tolist = get

            def __float__(self):
                return 5.0

            def __bool__(self):
                return True

            __int__ = get

        class Stream:
            def synchronize(self):
                return "waited"

        class ExternalStream(Stream):
            pass

        class Event:
            synchronize = Stream.synchronize

        self.ndarray = Array
        self.allocators = []
        self.cuda = SimpleNamespace(
            Stream=Stream, ExternalStream=ExternalStream, Event=Event, using_allocator=self.using
        )

    @contextlib.contextmanager
    def using(self, allocator):
        self.allocators.append(allocator)
        yield
        self.allocators.pop()


def test_what_goes_past_the_device_is_refused_while_the_guard_stands():
    cupy = FakeCupy()
    array = cupy.ndarray()
    calls = [
        lambda: array.get(),
        lambda: array.item(),
        lambda: float(array),
        lambda: int(array),
        lambda: array.tolist(),
    ]
    waits = [cupy.cuda.Stream(), cupy.cuda.ExternalStream(), cupy.cuda.Event()]
    with refused(cupy, refuse):
        assert cupy.allocators == [refuse]
        for call in [*calls, lambda: array.set(1), lambda: bool(array)]:
            with pytest.raises(Refused):
                call()
        for wait in waits:
            with pytest.raises(Refused):
                wait.synchronize()
    assert cupy.allocators == []
    assert [call() for call in calls] == [5, 5, 5.0, 5, 5]
    assert [wait.synchronize() for wait in waits] == ["waited"] * 3


@pytest.mark.hot_path
def test_cuda_cupy_itself_is_refused_the_host():
    try:
        card = bitnet_ext.gpu.device.cuda_device()
    except DeviceUnavailableError as error:
        pytest.skip(str(error))
    import cupy

    array = card.to_device(np.arange(4, dtype=np.float32))
    other = card.empty((4,), np.float32)
    other[...] = array  # compiles what a copy inside the card takes
    event = cupy.cuda.Event()
    event.record()
    host = np.zeros(4, np.float32)
    ways = [
        lambda: array.get(),
        lambda: cupy.asnumpy(array),
        lambda: array.set(host),
        lambda: array[0].item(),
        lambda: float(array[0]),
        lambda: bool(array[0] > 0),
        lambda: cupy.zeros(3),
        lambda: array + 1,
        lambda: cupy.asarray(host),
        lambda: cupy.cuda.get_current_stream().synchronize(),
        lambda: event.synchronize(),
        lambda: card.synchronize(),
        lambda: card.to_host(array),
        lambda: card.to_device(host),
        lambda: card.empty((3,), np.int8),
    ]
    with refused(cupy, refuse):
        other[...] = array
        for way in ways:
            with pytest.raises(Refused):
                way()
    np.testing.assert_array_equal(card.to_host(other), np.arange(4))


def test_emulated_arrays_are_refused_the_host_and_memory(monkeypatch):
    device = EmulatedDevice()
    array = device.to_device(np.arange(4, dtype=np.float32))
    mask = device.to_device(np.array([True, False, True, True]))
    ways = [
        lambda: array + 1,
        lambda: array.astype(np.int32),
        lambda: array.copy(),
        lambda: array.sum(),
        lambda: array[mask],
        lambda: array[np.array([0, 2])],
        lambda: np.concatenate([array, array]),
        lambda: array.tolist(),
        lambda: array[:1].item(),
        lambda: float(array[:1].reshape(())),
        lambda: bool(array[:1]),
        lambda: device.empty((3,), np.int8),
        lambda: device.to_host(array),
    ]
    with hot(device, monkeypatch):
        array[...] = array.reshape(2, 2).T.ravel(order="K")[::-1]  # views alone
        array[1:] = 5
        for way in ways:
            with pytest.raises(TheHost):
                way()
    assert (array + 1).tolist()[1:] == [6, 6, 6]
