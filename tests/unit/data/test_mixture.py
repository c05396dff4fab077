"""The interleaving of sources is a closed form of the sequence's number."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.order import SLOTS, Mixture
from moe_dist.errors import ConfigError
from tests.support.messages import refused


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
