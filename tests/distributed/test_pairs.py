"""Real ranks measure each pair of nodes, and measure doubtful pairs a second time."""

import pytest
import torch

from moe_dist.parallel import pair_bandwidth as pairs
from moe_dist.parallel.pair_bandwidth import NodeRanks, measure_pairs, names_of_nodes
from moe_dist.parallel.round_robin import PairExchange
from tests.support.worlds import RankContext

CPU = torch.device("cpu")


def measure(rank: RankContext, per_node: int, doubted: list[tuple[int, int]], slow: list[tuple[int, int]]) -> list[object]:
    """Measures all pairs. The pairs `doubted` look slow once, and the pairs `slow` look slow twice."""
    ranks = NodeRanks(rank.rank, rank.world_size // per_node, per_node)
    names = names_of_nodes(f"node{ranks.node}", ranks, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs, "SECONDS", 0.02)
        patch.setattr(pairs, "slow_pairs", lambda measured: doubted)
        patch.setattr(pairs, "_stays_slow", lambda pair, *others: pairs_stays_slow(pair, *others) or pair in slow)
        patch.setattr(pairs, "is_slow", lambda own, than: False)
        measured, found = measure_pairs(ranks, payload_bytes=1 << 14, device=CPU, timeout=600.0)
    return [names, sorted(measured), found, [(each.all_reduce, each.all_to_all) for each in measured.values()]]


pairs_stays_slow = pairs._stays_slow


def test_three_nodes_each_pair_once_and_the_doubted_again(run_in_world) -> None:
    results = run_in_world(3, measure, 1, [(0, 1), (1, 2)], [(1, 2)])
    assert results[0] == results[1] == results[2], "all ranks agree"
    names, measured, slow, seconds = results[0]
    assert names == ["node0", "node1", "node2"]
    assert measured == [(0, 1), (0, 2), (1, 2)]
    assert slow == [(1, 2)]
    assert all(0.0 < second < 30.0 for pair in seconds for second in pair)


def test_two_nodes_of_two_ranks(run_in_world) -> None:
    results = run_in_world(4, measure, 2, [], [])
    assert [result[:3] for result in results] == [[["node0", "node1"], [(0, 1)], []]] * 4


def test_a_pair_is_slow_only_if_it_is_at_every_look() -> None:
    class Looks:
        def __init__(self, *own: float) -> None:
            self._own = list(own)

        def measure(self, wanted: list[tuple[int, int]], groups: object) -> dict[tuple[int, int], PairExchange]:
            return {pair: PairExchange(1.0, self._own.pop(0) if pair == (0, 1) else 1.0) for pair in wanted}

    assert [pairs._num_looks(each) for each in (1, 10, 20, 63)] == [10, 10, 5, 3]
    assert pairs._stays_slow((0, 1), (1, 2), Looks(*[3.0] * 10), {}, 10)  # pyright: ignore
    assert not pairs._stays_slow((0, 1), (1, 2), Looks(*[3.0] * 9, 1.9), {}, 10)  # pyright: ignore
