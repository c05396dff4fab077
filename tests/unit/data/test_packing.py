"""Packing: each token appears once, no sequence is too long, and there is little padding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.order import cut, pack


def test_cut_by_hand() -> None:
    pieces = cut(np.array([100, 0, 50]), np.array([9, 0, 4]), seq_len=4)
    assert pieces.start_P.tolist() == [100, 104, 108, 50]
    assert pieces.length_P.tolist() == [4, 4, 1, 4]
    assert pieces.goes_on_P.tolist() == [True, True, False, False]


def test_best_fit_by_hand() -> None:
    # Longest first: 7, 6, 4, 3, 3, 1 into sequences of 10. 4 joins 6, the first 3 joins 7, and the other 3 starts a
    # sequence.
    packing = pack(np.array([3, 7, 4, 1, 6, 3]), seq_len=10, window=100)
    assert [packing.pieces_of(q) for q in range(len(packing))] == [[1, 0], [4, 2], [5, 3]]


def test_a_piece_is_not_packed_with_one_of_another_window() -> None:
    packing = pack(np.array([3, 3, 3, 3]), seq_len=12, window=2)
    assert [packing.pieces_of(q) for q in range(len(packing))] == [[0, 1], [2, 3]]


@given(
    lengths=st.lists(st.integers(0, 40), max_size=200),
    seq_len=st.integers(1, 16),
    window=st.integers(1, 50),
)
def test_every_token_once(lengths: list[int], seq_len: int, window: int) -> None:
    starts = np.cumsum([0, *lengths])[:-1]
    pieces = cut(starts, np.array(lengths, np.int64), seq_len=seq_len)
    packing = pack(pieces.length_P, seq_len=seq_len, window=window)
    seen: list[int] = []
    for sequence in range(len(packing)):
        members = packing.pieces_of(sequence)
        assert members
        assert pieces.length_P[members].sum() <= seq_len
        for piece in members:
            seen.extend(range(pieces.start_P[piece], pieces.start_P[piece] + pieces.length_P[piece]))
    assert sorted(seen) == list(range(sum(lengths)))
    ends = set((starts + np.array(lengths, np.int64)).tolist())
    for end, goes_on in zip(pieces.start_P + pieces.length_P, pieces.goes_on_P, strict=True):
        assert goes_on == (end not in ends)


def test_little_is_padding() -> None:
    lengths = np.random.default_rng(0).integers(40, 120, 5000)
    packing = pack(lengths, seq_len=256, window=512)
    assert lengths.sum() / (len(packing) * 256) > 0.95
