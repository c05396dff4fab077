"""Rounds in which every two of n nodes meet once, and which of the pairs are slow. Pure functions; no torch.

A collective over all nodes is as fast as its slowest link and does not say which that is. In a round-robin tournament each
node meets each other once, in n - 1 rounds (n where n is odd) in which all pairs are disjoint, so that no two of them share
a node's link.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLOW = 2.0  # times the usual pair
Pair = tuple[int, int]


@dataclass(frozen=True)
class PairExchange:
    """How long a pair took, the best of its repetitions.

    Attributes:
        all_reduce, all_to_all: Seconds of one collective.
    """

    all_reduce: float
    all_to_all: float


def round_robin(num_nodes: int) -> list[list[Pair]]:
    """Rounds of disjoint pairs in which every two nodes meet exactly once (the circle method: one stays, the others turn).
    With an odd number one node rests in each round."""
    if num_nodes < 2:
        return []
    seats = list(range(num_nodes + num_nodes % 2))  # the last seat may be empty
    rounds = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        rounds.append(sorted((min(a, b), max(a, b)) for a, b in pairs if max(a, b) < num_nodes))
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return rounds


def usual(seconds: Iterable[float]) -> float:
    """What a pair takes that nothing is wrong with: the lower median. So one slow node among four is still told from the
    others, although half of the pairs are its own; among three nodes it is the fastest pair."""
    ordered = sorted(seconds)
    return ordered[0] if len(ordered) <= 3 else statistics.median_low(ordered)


def usual_pair(measured: Mapping[Pair, PairExchange]) -> Pair:
    """The pair whose all-to-all took the usual time."""
    seconds = usual(each.all_to_all for each in measured.values())
    return min(pair for pair, each in measured.items() if each.all_to_all == seconds)


def is_slow(exchange: PairExchange, *, than: PairExchange) -> bool:
    """Whether one of the collectives took more than SLOW times as long."""
    return exchange.all_reduce > SLOW * than.all_reduce or exchange.all_to_all > SLOW * than.all_to_all


def slow_pairs(measured: Mapping[Pair, PairExchange]) -> list[Pair]:
    """Pairs that look slow beside the usual one. Three pairs are the fewest that can tell."""
    if len(measured) < 3:
        return []
    reduce, exchange = (usual(getattr(each, kind) for each in measured.values()) for kind in ("all_reduce", "all_to_all"))
    return sorted(pair for pair, each in measured.items() if is_slow(each, than=PairExchange(reduce, exchange)))
