"""Which pair of nodes is slow: every pair is measured once, in rounds of disjoint pairs. Pure functions; no torch.

A collective over all nodes is as fast as its slowest link and does not say which that is. In a round-robin tournament of n
nodes each meets each other once, in n - 1 rounds (n where n is odd) in which all pairs are disjoint, so that no two of them
share a node's link. What is slow is measured again by itself before it is named.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moe_dist.doctor.finding import Finding, names, note, ok, warning

CHECK = "fabric"
SLOW = 2.0  # times the usual pair
Pair = tuple[int, int]


@dataclass(frozen=True)
class Exchange:
    """How long a pair took, the best of its repetitions.

    Attributes:
        all_reduce, all_to_all: Seconds of one collective.
    """

    all_reduce: float
    all_to_all: float

    def best(self, other: "Exchange") -> "Exchange":
        """The faster of two measurements, each for itself."""
        return Exchange(min(self.all_reduce, other.all_reduce), min(self.all_to_all, other.all_to_all))


def tournament(num_nodes: int) -> list[list[Pair]]:
    """Rounds of disjoint pairs in which every two nodes meet exactly once (the circle method: one stays, the others turn).
    With an odd number one node rests in each round."""
    seats = list(range(num_nodes + num_nodes % 2))  # the last seat may be empty
    rounds = []
    for _ in range(max(0, len(seats) - 1)):
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


def slow_pairs(measured: Mapping[Pair, Exchange]) -> list[Pair]:
    """Pairs in which one of the collectives took more than SLOW times as long as in the usual pair. Three pairs are the
    fewest that can tell."""
    if len(measured) < 3:
        return []
    usual_reduce = usual(each.all_reduce for each in measured.values())
    usual_exchange = usual(each.all_to_all for each in measured.values())
    return sorted(
        pair
        for pair, each in measured.items()
        if each.all_reduce > SLOW * usual_reduce or each.all_to_all > SLOW * usual_exchange
    )


def judge(measured: Mapping[Pair, Exchange], nodes: Sequence[str], *, payload_bytes: int) -> list[Finding]:
    """One line a cause: a node that is slow with every other, or else a pair.

    Args:
        measured: The best of every pair, suspects having been measured twice.
        nodes: Names by number.
        payload_bytes: What a node sends to the other in an all-to-all.
    """
    if len(nodes) < 2:
        return [note(CHECK, "one node: no pair to measure")]
    pairs = slow_pairs(measured)
    rate = _rate(payload_bytes, usual(each.all_to_all for each in measured.values()))
    if not pairs:
        few = "; too few pairs to compare" if len(measured) < 3 else ", none twice as slow as the usual one"
        return [ok(CHECK, f"{len(measured)} pairs of {len(nodes)} nodes{few}: {rate} each way in all-to-all")]
    findings, left = [], list(pairs)
    for node, name in enumerate(nodes):
        own = [pair for pair in left if node in pair]
        if len(own) == len(nodes) - 1 and len(nodes) > 2:
            worst = max(measured[pair].all_to_all for pair in own)
            left = [pair for pair in left if node not in pair]
            findings.append(
                warning(
                    CHECK,
                    f"{name} is slow with every other node: down to {_rate(payload_bytes, worst)}, others {rate}",
                    f"look at its network card, cable and interface (cluster file), or leave it out: --exclude={name}",
                )
            )
    for first, second in left:
        each = measured[first, second]
        findings.append(
            warning(
                CHECK,
                f"{names([nodes[first], nodes[second]])} are slow with each other: {_rate(payload_bytes, each.all_to_all)} "
                f"in all-to-all, {each.all_reduce * 1e3:.3g} ms an all-reduce; the usual pair has {rate}",
                "look at the switches and cables between the two, or leave one out (Slurm: --exclude)",
            )
        )
    return findings


def _rate(payload_bytes: int, seconds: float) -> str:
    rate = payload_bytes / seconds
    return f"{rate / 1e9:.3g} GB/s" if rate >= 1e9 else f"{rate / 1e6:.3g} MB/s"
