"""DispatchMetrics: what ran, on which ISA, in which mode, on how many threads."""

import threading

import bitnet_ext as bx
from bitnet_ext import _core


def fill(side: int = 8) -> None:
    bx.create_causal_mask(side, side)


def rows(metrics: bx.DispatchMetrics) -> dict:
    return {key: (count.calls, count.bytes) for key, count in metrics.as_dict().items()}


def test_calls_and_bytes_of_the_block_alone(isa: str) -> None:
    table = _core.kernel_tables()["mask"]
    fill()
    with bx.DispatchMetrics() as metrics:
        fill()
        fill(16)
    fill()
    assert rows(metrics) == {("mask_fill", "cpu", table, "op"): (2, 4 * (8 * 8 + 16 * 16))}
    count = metrics.as_dict()["mask_fill", "cpu", table, "op"]
    assert count.seconds > 0
    assert count.threads == 1


def test_counts_can_be_read_inside_the_block() -> None:
    with bx.DispatchMetrics() as metrics:
        assert metrics.as_dict() == {}
        fill()
        assert [count.calls for count in metrics.as_dict().values()] == [1]
        fill()
        assert [count.calls for count in metrics.as_dict().values()] == [2]


def test_blocks_nest() -> None:
    with bx.DispatchMetrics() as outer:
        fill()
        with bx.DispatchMetrics() as inner:
            fill()
        fill()
    assert [count.calls for count in inner.as_dict().values()] == [1]
    assert [count.calls for count in outer.as_dict().values()] == [3]


def test_nothing_is_counted_outside() -> None:
    before = _core.metrics_snapshot()
    fill()
    assert _core.metrics_snapshot() == before


def test_block_is_left_by_an_error() -> None:
    metrics = bx.DispatchMetrics()
    try:
        with metrics:
            fill()
            raise KeyError
    except KeyError:
        fill()
    assert [count.calls for count in metrics.as_dict().values()] == [1]


def test_mode_belongs_to_the_thread() -> None:
    def other() -> None:
        _core.set_mode("incremental")
        fill()

    with bx.DispatchMetrics() as metrics:
        _core.set_mode("full")
        try:
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
            fill()
        finally:
            _core.set_mode("op")
        fill()
    modes = {mode: count.calls for (_, _, _, mode), count in metrics.as_dict().items()}
    assert modes == {"full": 1, "incremental": 1, "op": 1}


def test_threads_are_those_of_the_block(until_threads) -> None:
    until_threads(2, lambda: fill(1500))
    bx.set_num_threads(1)
    with bx.DispatchMetrics() as metrics:
        fill(1500)
    assert [count.threads for count in metrics.as_dict().values()] == [1]
