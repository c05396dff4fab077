"""How fast every two nodes exchange: all-reduce and all-to-all over disjoint pairs of nodes, round by round.

Every rank calls `measure_pairs`; a pair is all ranks of both nodes, so that each network card of theirs takes part.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.comm.tournament import Exchange, Pair, slow_pairs, tournament
from moe_dist.parallel.mesh import group_of

NAME_BYTES = 128
REPEATS, SECONDS_A_PAIR = 10, 1.0  # the best of so many, or of those that fit into the time


@dataclass(frozen=True)
class Ranks:
    """The ranks of a measurement: `per_node` on each of `nodes` nodes, in order."""

    rank: int
    nodes: int
    per_node: int

    @property
    def node(self) -> int:
        return self.rank // self.per_node

    def of(self, pair: Pair) -> list[int]:
        return [node * self.per_node + local for node in pair for local in range(self.per_node)]


def measure_pairs(ranks: Ranks, *, payload_bytes: int, device: torch.device, timeout: float) -> dict[Pair, Exchange]:
    """The best of every pair, the same on every rank. What looks slow is measured once more, one pair after the other.

    Args:
        payload_bytes: What a rank sends to the other node in an all-to-all, and the size of its all-reduce.
        timeout: Seconds, for every collective.
    """
    measured: dict[Pair, Exchange] = {}
    for pairs in tournament(ranks.nodes):
        measured |= _round(pairs, ranks, payload_bytes, device, timeout)
    # torch names a group after its ranks and the number of groups there are. Without one more a pair's second group would
    # have the name of its first, find the addresses of that in the store, and wait for them forever.
    spare = group_of([ranks.rank], timeout=timeout)
    for pair in slow_pairs(measured):
        again = _round([pair], ranks, payload_bytes, device, timeout)
        measured[pair] = measured[pair].best(again[pair])
    dist.destroy_process_group(spare)
    return measured


def names_of_nodes(own: str, ranks: Ranks, device: torch.device) -> list[str]:
    """Names of the nodes in order. Collective over all ranks; as bytes, since nothing is unpickled."""
    text = torch.tensor(list(own.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")), dtype=torch.uint8, device=device)
    everywhere = [torch.empty_like(text) for _ in range(ranks.nodes * ranks.per_node)]
    dist.all_gather(everywhere, text)
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everywhere[:: ranks.per_node]]


def _round(
    pairs: list[Pair], ranks: Ranks, payload_bytes: int, device: torch.device, timeout: float
) -> dict[Pair, Exchange]:
    """Measures disjoint pairs at the same time. Collective over all ranks; syncs with the host."""
    seconds = torch.zeros(len(pairs), 2, dtype=torch.float64, device=device)
    for number, pair in enumerate(pairs):
        if ranks.node in pair:
            seconds[number] = torch.tensor(_pair(pair, ranks, payload_bytes, device, timeout), dtype=torch.float64)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)  # the slower of both ends; and nobody begins the next round before
    return {pair: Exchange(*values) for pair, values in zip(pairs, seconds.tolist(), strict=True)}


def _pair(pair: Pair, ranks: Ranks, payload_bytes: int, device: torch.device, timeout: float) -> tuple[float, float]:
    """Seconds of an all-reduce and an all-to-all on this rank, each the best."""
    members = ranks.of(pair)
    group = group_of(members, timeout=timeout)
    elements = -(-payload_bytes // 4 // ranks.per_node) * ranks.per_node
    sent, received = torch.zeros(elements, device=device), torch.zeros(elements, device=device)
    own = pair.index(ranks.node)
    # To the ranks of the other node alone: what stays at home says nothing about the network.
    splits = [0 if index // ranks.per_node == own else elements // ranks.per_node for index in range(len(members))]

    def all_reduce() -> None:
        dist.all_reduce(received, group=group)

    def all_to_all() -> None:
        dist.all_to_all_single(received, sent, splits, splits, group=group)

    try:
        return _best(all_reduce, group, device), _best(all_to_all, group, device)
    finally:
        dist.destroy_process_group(group)


def _best(collective: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    collective()  # connections are made at the first use
    best = _seconds(collective, device)
    repeats = torch.tensor([min(REPEATS, max(1, int(SECONDS_A_PAIR / best)))], device=device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN, group=group)  # both ends must agree on it
    return min([best, *(_seconds(collective, device) for _ in range(int(repeats)))])


def _seconds(collective: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    collective()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
