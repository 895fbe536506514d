"""One model serves several Python threads; forks and shared caches."""

import threading

import fresh
import numpy as np
import pytest

import bitnet_ext as bx


@pytest.fixture(scope="module")
def model() -> bx.BitNetModel:
    return bx.BitNetModel.random(bx.BitNetConfig.tiny(), seed=3)


def trace(model: bx.BitNetModel, seed: int) -> list[bytes]:
    """The logits of a prefill and of steps after it, with a cache of its own."""
    ids = np.random.default_rng(seed).integers(0, model.config.vocab_size, 40)
    cache = model.new_cache()
    logits = [model.prefill(ids[:30], cache).tobytes()]
    return logits + [model.decode([token], cache).tobytes() for token in ids[30:]]


def test_the_model_releases_the_interpreter(ticks: list[int], model: bx.BitNetModel) -> None:
    ids = list(range(300))  # ready before: drawing them would give the interpreter away as well
    cache = model.new_cache()
    before = ticks[0]
    for _ in range(300):  # a busy machine may not run the other thread at once
        cache.reset()
        model.prefill(ids, cache)
        if ticks[0] > before:
            return
    pytest.fail("no other Python thread ran")


def test_python_threads_with_separate_caches_get_the_bits_of_each_alone(
    model: bx.BitNetModel, threads: None
) -> None:
    bx.set_num_threads(2)
    alone = [trace(model, seed) for seed in range(4)]
    found: list[list[bytes]] = [[] for _ in alone]

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = trace(model, i)
            if found[i] != alone[i]:
                return

    workers = [threading.Thread(target=work, args=(i,)) for i in range(len(alone))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == alone


def test_a_shared_cache_raises(model: bx.BitNetModel) -> None:
    cache = model.new_cache()
    model.prefill([1, 2, 3], cache)
    with cache._core.lease(), pytest.raises(RuntimeError, match="in use"):
        model.decode([4], cache)
    assert cache.length.tolist() == [3]
    model.decode([4], cache)
    assert cache.length.tolist() == [4]


def test_a_forked_child_runs_the_model() -> None:
    fresh.output(
        "import os, warnings\n"
        "import numpy as np\n"
        "import bitnet_ext as bx\n"
        "warnings.simplefilter('ignore', DeprecationWarning)\n"
        "model = bx.BitNetModel.random(bx.BitNetConfig.tiny())\n"
        "wanted = model.forward_full(list(range(100)))\n"
        "pid = os.fork()\n"
        "same = np.array_equal(model.forward_full(list(range(100))), wanted)\n"
        "if pid == 0:\n"
        "    os._exit(0 if same else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0 and same\n",
        BITNET_NUM_THREADS="2",
    )
