"""Nodes meet in rounds of disjoint pairs, and slow pairs are found."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.parallel.round_robin import PairExchange, round_robin, slow_pairs, usual_pair


@given(st.integers(2, 40))
def test_every_two_meet_once_and_no_node_twice_in_a_round(nodes: int) -> None:
    rounds = round_robin(nodes)
    assert len(rounds) == nodes - 1 + nodes % 2
    assert sorted(pair for pairs in rounds for pair in pairs) == list(combinations(range(nodes), 2))
    for pairs in rounds:
        assert len({node for pair in pairs for node in pair}) == 2 * len(pairs)


def measured(
    nodes: int, slow: dict[tuple[int, int], float], *, kind: str = "all_to_all"
) -> dict[tuple[int, int], PairExchange]:
    """Returns the times of all pairs: 1 s, except for the pairs in `slow`, which are slower in the collective `kind`."""
    other = "all_reduce" if kind == "all_to_all" else "all_to_all"
    return {pair: PairExchange(**{kind: slow.get(pair, 1.0), other: 1.0}) for pair in combinations(range(nodes), 2)}


@pytest.mark.parametrize("kind", ["all_reduce", "all_to_all"])
@pytest.mark.parametrize("nodes", [3, 4, 8])
def test_a_pair_is_suspected_from_twice_the_usual_time_on(nodes: int, kind: str) -> None:
    assert slow_pairs(measured(nodes, {(0, 2): 2.1}, kind=kind)) == [(0, 2)]
    assert slow_pairs(measured(nodes, {(0, 2): 1.9}, kind=kind)) == []


@pytest.mark.parametrize("nodes", [3, 4, 5, 9])
def test_a_slow_node_does_not_become_the_reference(nodes: int) -> None:
    its_own = {pair: 5.0 for pair in combinations(range(nodes), 2) if 1 in pair}
    assert slow_pairs(measured(nodes, its_own)) == sorted(its_own)
    assert 1 not in usual_pair(measured(nodes, its_own))
