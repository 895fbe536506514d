"""Fixtures every test shares: one run per instruction set, and the process state put back."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import nvrtc
import pytest
from cuda_emulator import arrays, emulator

import bitnet_ext as bx
import bitnet_ext.gpu.device
from bitnet_ext.errors import DeviceUnavailableError

# A shell's background job ignores SIGINT, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Under GitHub Actions typer would colour help texts; tests read them as a pipe gets them.
os.environ["_TYPER_FORCE_DISABLE_TERMINAL"] = "1"

# Child processes take the package under test as well, not the sources in the working directory,
# which have no extensions beside them when the package is installed.
os.environ["PYTHONSAFEPATH"] = "1"
if "PYTHONPATH" in os.environ:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        os.path.abspath(entry) for entry in os.environ["PYTHONPATH"].split(os.pathsep)
    )


AHEAD = pytest.StashKey[subprocess.Popen[bytes]]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """In a run of everything, a core that tests leave idle compiles the CUDA kernels."""
    cases = [
        (item.callspec.params["file"], item.callspec.params["arch"])
        for item in session.items
        if isinstance(item, pytest.Function) and item.originalname == "test_compiles_without_spills"
    ]
    several = len(session.items) > 2 * len(cases) > 0 and len(os.sched_getaffinity(0)) > 1
    if several and not session.config.option.collectonly and nvrtc.missing() is None:
        session.config.stash[AHEAD] = nvrtc.compile_ahead(cases)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if process := session.config.stash.get(AHEAD, None):
        process.terminate()
        process.wait()


@pytest.fixture(params=bx.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Force each ISA of this CPU in turn."""
    before = bx.get_isa()
    bx.set_isa(request.param)
    yield request.param
    bx.set_isa(before)


@pytest.fixture
def threads() -> Iterator[None]:
    """Put the number of threads back after a test that changes it."""
    before = bx.get_num_threads()
    yield
    bx.set_num_threads(before)


@pytest.fixture
def until_threads(threads: None) -> Callable[[int, Callable[[], object]], None]:
    """Repeat a call until ``n`` threads took part in one op of it.

    Work goes to whoever comes first: on a busy machine the caller may have done it all before
    another thread wakes.
    """

    def until(n: int, call: Callable[[], object]) -> None:
        bx.set_num_threads(n)
        for _ in range(1000):
            with bx.DispatchMetrics() as metrics:
                call()
            if any(count.threads == n for count in metrics.as_dict().values()):
                return
        pytest.fail(f"no op ran on {n} threads")

    return until


@pytest.fixture
def ticks() -> Iterator[list[int]]:
    """A count that another Python thread raises whenever it gets the interpreter."""
    count, stop = [0], threading.Event()

    def tick() -> None:
        while not stop.is_set():
            count[0] += 1
            time.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=tick)
    thread.start()
    sys.setswitchinterval(1000)  # nobody takes the interpreter: it must be given
    yield count
    sys.setswitchinterval(interval)
    stop.set()
    thread.join()


@pytest.fixture(params=["ascending", "descending", "cuda"])
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> bitnet_ext.gpu.device.Device:
    """Where ``device="cuda"`` runs: emulated, with threads in either order, and a card.

    ``device.to_device(array)`` brings arrays there, ``device.to_host(array)`` back. With
    BITNET_TEST_CUDA in the environment a card that is not there fails the tests that want one.
    """
    if request.param == "cuda":
        try:
            return bitnet_ext.gpu.device.cuda_device()
        except DeviceUnavailableError as error:
            if "BITNET_TEST_CUDA" in os.environ:
                raise
            pytest.skip(str(error))
    if reason := emulator.missing():
        pytest.skip(reason)
    emulated = emulator.EmulatedDevice(90, descending=request.param == "descending")
    monkeypatch.setattr(bitnet_ext.gpu.device, "cuda_device", lambda: emulated)
    arrays.refuse_conversions(monkeypatch)
    return emulated
