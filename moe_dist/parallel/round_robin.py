"""Schedules pairs of nodes in rounds, and detects slow pairs. All functions are pure and need no torch.

A collective over all nodes shows the speed of the slowest link, but not which link is the slowest. A round-robin schedule
measures every pair of n nodes once, in n - 1 rounds (n if n is odd). Pairs of one round share no node and no link.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SLOW = 2.0  # a pair is slow if it takes more than this multiple of the usual time
Pair = tuple[int, int]


@dataclass(frozen=True)
class PairExchange:
    """The best times of all-reduce and all-to-all on a pair of nodes, in seconds."""

    all_reduce: float
    all_to_all: float


def round_robin(num_nodes: int) -> list[list[Pair]]:
    """Returns rounds of pairs, in which every pair occurs once (circle method: one node is fixed, all others rotate). If
    the number of nodes is odd, one node is idle in each round."""
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
    """Returns the time of a normal pair: the lower median. If one of four nodes is slow, half of the six pairs are slow,
    but the lower median is still a normal time. For at most three pairs, returns the smallest time."""
    ordered = sorted(seconds)
    # if one of three nodes is slow, two of the three pairs are slow
    return ordered[0] if len(ordered) <= 3 else statistics.median_low(ordered)


def usual_pair(measured: Mapping[Pair, PairExchange]) -> Pair:
    """Returns a pair whose all-to-all takes the usual time."""
    seconds = usual(each.all_to_all for each in measured.values())
    return min(pair for pair, each in measured.items() if each.all_to_all == seconds)


def is_slow(exchange: PairExchange, *, than: PairExchange) -> bool:
    """Returns whether a collective takes more than SLOW times as long in `exchange` as in `than`."""
    return exchange.all_reduce > SLOW * than.all_reduce or exchange.all_to_all > SLOW * than.all_to_all


def slow_pairs(measured: Mapping[Pair, PairExchange]) -> list[Pair]:
    """Returns the pairs that are slow compared with the usual times. If there are fewer than three pairs, none is slow."""
    if len(measured) < 3:
        return []
    reduce, exchange = (usual(getattr(each, kind) for each in measured.values()) for kind in ("all_reduce", "all_to_all"))
    return sorted(pair for pair, each in measured.items() if is_slow(each, than=PairExchange(reduce, exchange)))
