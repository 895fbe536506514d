"""Token ids of every accepted form become the same packed rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitnet_ext.errors import InvalidShapeError
from bitnet_ext.model.batch import TokenBatch


def test_forms_are_told_apart():
    assert TokenBatch.of([1, 2, 3], None, 10).form == "single"
    assert TokenBatch.of(np.array([1, 2]), None, 10).form == "single"
    assert TokenBatch.of([[1, 2], [3, 4]], None, 10).form == "batch"
    assert TokenBatch.of([[1, 2], [3]], None, 10).form == "list"
    assert TokenBatch.of([np.array([1, 2]), np.array([3])], None, 10).form == "list"
    assert TokenBatch.of([[1, 2], [3, 4]], None, 10, as_list=True).form == "list"


def test_lengths_drop_padding():
    batch = TokenBatch.of([[1, 2, 0], [3, 0, 0]], [2, 1], 10)
    assert batch.ids.tolist() == [1, 2, 3]
    assert batch.counts.tolist() == [2, 1]
    assert batch.width == 3


def test_padding_may_hold_anything():
    batch = TokenBatch.of([[1, 2, -100]], [2], 10)
    assert batch.ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("ids", "lengths", "text"),
    [
        ([[1.5]], None, "wanted integers"),
        ([True, False], None, "wanted integers"),
        ([[[1]]], None, "wanted"),
        ([10], None, "found id 10, wanted 0 to 9"),
        ([-1], None, "found id -1"),
        ([[1, 2]], [3], "wanted 1 values from 0 to 2"),
        ([[1, 2]], [1, 1], "wanted 1 values"),
        ([[1, 2]], [-1], "wanted 1 values"),
        ([1, 2], [2], "wanted None"),
        ([[1, 2], [3]], [2, 1], "wanted None"),
        ([[1, 2], [0.5]], None, r"token_ids\[1\]"),
    ],
)
def test_bad_ids_are_named(ids, lengths, text):
    with pytest.raises(InvalidShapeError, match=text):
        TokenBatch.of(ids, lengths, 10)


@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any),
    limit=st.integers(1, 9),
    data=st.data(),
)
def test_blocks_cover_every_row_once(counts, limit, data):
    past = np.array(
        data.draw(st.lists(st.integers(0, 50), min_size=len(counts), max_size=len(counts))),
        np.int32,
    )
    sequences = [list(range(10 * i, 10 * i + n)) for i, n in enumerate(counts)]
    batch = TokenBatch.of(sequences, None, 100, as_list=True)
    kept = np.array([data.draw(st.integers(0, n)) for n in counts], np.int32)
    seen, wanted_last = [], []
    for low, rows in batch.rows(past, limit, kept):
        assert low == len(seen)
        assert 1 <= len(rows) <= limit
        assert rows.starts[-1] == len(rows)
        for b in range(len(counts)):
            mine = slice(rows.starts[b], rows.starts[b + 1])
            assert (rows.seq[mine] == b).all()
            if mine.stop > mine.start:
                assert rows.first_pos[b] == rows.pos[mine.start]
            count = mine.stop - mine.start if rows.kept is None else rows.kept[b]
            assert 0 <= count <= mine.stop - mine.start
            wanted_last += rows.ids[mine][len(rows.ids[mine]) - count :].tolist()
        seen += list(zip(rows.ids.tolist(), rows.seq.tolist(), rows.pos.tolist(), strict=True))
    wanted = [
        (token, b, int(past[b]) + t)
        for b, sequence in enumerate(sequences)
        for t, token in enumerate(sequence)
    ]
    assert seen == wanted
    ends = [ids[len(ids) - n :] for ids, n in zip(sequences, kept, strict=True)]
    assert wanted_last == [token for ids in ends for token in ids]
