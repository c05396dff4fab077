"""Documents are cut into pieces, pieces are packed into sequences, and sources are mixed in the given shares."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.order import SLOTS, Mixture, cut, pack
from moe_dist.errors import ConfigError
from tests.support.messages import refused


def test_cut_by_hand() -> None:
    pieces = cut(np.array([100, 0, 50]), np.array([9, 0, 4]), seq_len=4)
    assert pieces.start_P.tolist() == [100, 104, 108, 50]
    assert pieces.length_P.tolist() == [4, 4, 1, 4]
    assert pieces.goes_on_P.tolist() == [True, True, False, False]


def test_best_fit_by_hand() -> None:
    # The longest pieces come first: 7, 6, 4, 3, 3, 1. A sequence has 10 tokens. The piece of 4 tokens joins the piece
    # of 6, the first piece of 3 joins the piece of 7, and the second piece of 3 starts a new sequence, which the piece
    # of 1 joins.
    packing = pack(np.array([3, 7, 4, 1, 6, 3]), seq_len=10, window=100)
    assert [packing.pieces_of(q) for q in range(len(packing))] == [[1, 0], [4, 2], [5, 3]]


def test_a_piece_is_not_packed_with_one_of_another_window() -> None:
    packing = pack(np.array([3, 3, 3, 3]), seq_len=12, window=2)
    assert [packing.pieces_of(q) for q in range(len(packing))] == [[0, 1], [2, 3]]


@given(lengths=st.lists(st.integers(0, 40), max_size=200), seq_len=st.integers(1, 16), window=st.integers(1, 50))
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


@given(shares=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), position=st.integers(0, 4 * SLOTS))
def test_places_count_up_within_each_source(shares: list[float], position: int) -> None:
    mixture = Mixture({f"s{i}": share for i, share in enumerate(shares)})
    counts = Counter({name: 0 for name in mixture.names})
    for sequence in range(position):
        source, index = mixture.place(sequence)
        assert index == counts[source]
        counts[source] += 1
    assert mixture.drawn(position) == counts


def test_shares_are_met_at_any_length() -> None:
    mixture = Mixture({"a": 6.0, "b": 3.0, "c": 1.0})
    for position in range(1, 2 * SLOTS):
        drawn = mixture.drawn(position)
        for name, share in (("a", 0.6), ("b", 0.3), ("c", 0.1)):
            assert abs(drawn[name] - share * position) <= 1


def test_a_tiny_source_is_not_forgotten() -> None:
    assert Mixture({"a": 1e9, "b": 1.0}).drawn(SLOTS) == {"a": SLOTS - 1, "b": 1}


@pytest.mark.parametrize("share", [0.0, -1.0, float("nan")])
def test_shares_must_be_positive(share: float) -> None:
    with refused(ConfigError, "data.weights"):
        Mixture({"a": 1.0, "b": share})
