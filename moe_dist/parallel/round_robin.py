"""Schedules pairs of nodes in rounds, and detects slow pairs. Pure functions without torch.

A collective over all nodes is as slow as its slowest link, but does not show which link is slow. A round-robin schedule
measures every pair of n nodes once, in n - 1 rounds (n rounds if n is odd). Pairs of a round share no node, and so no link.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLOW = 2.0  # a pair is slow above this multiple of the usual time
Pair = tuple[int, int]


@dataclass(frozen=True)
class PairExchange:
    """The best times of all-reduce and all-to-all on a pair of nodes, in seconds."""

    all_reduce: float
    all_to_all: float


def round_robin(num_nodes: int) -> list[list[Pair]]:
    """Returns rounds of pairs, in which every pair occurs once (circle method: one node is fixed, all others rotate). With
    an odd number of nodes, one node pauses in each round."""
    if num_nodes < 2:
        return []
    circle = list(range(num_nodes + num_nodes % 2))  # adds a dummy node if the number is odd
    rounds = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append(sorted((min(a, b), max(a, b)) for a, b in pairs if max(a, b) < num_nodes))
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return rounds


def usual(seconds: Iterable[float]) -> float:
    """Returns the time of a normal pair: the lower median. It is normal even if one of four nodes is slow, which slows half
    of the pairs. For at most three pairs returns the least time."""
    ordered = sorted(seconds)
    # of three nodes, a slow node is in two of the three pairs
    return ordered[0] if len(ordered) <= 3 else statistics.median_low(ordered)


def usual_pair(measured: Mapping[Pair, PairExchange]) -> Pair:
    """Returns a pair whose all-to-all takes the usual time."""
    seconds = usual(each.all_to_all for each in measured.values())
    return min(pair for pair, each in measured.items() if each.all_to_all == seconds)


def is_slow(exchange: PairExchange, *, than: PairExchange) -> bool:
    """Returns whether one of the pair's collectives takes more than SLOW times as long as on the pair `than`."""
    return exchange.all_reduce > SLOW * than.all_reduce or exchange.all_to_all > SLOW * than.all_to_all


def slow_pairs(measured: Mapping[Pair, PairExchange]) -> list[Pair]:
    """Returns the pairs that are slow compared with the usual times. With fewer than three pairs, none counts as slow."""
    if len(measured) < 3:
        return []
    reduce, exchange = (usual(getattr(each, kind) for each in measured.values()) for kind in ("all_reduce", "all_to_all"))
    return sorted(pair for pair, each in measured.items() if is_slow(each, than=PairExchange(reduce, exchange)))
