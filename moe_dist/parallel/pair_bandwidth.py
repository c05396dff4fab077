"""Measures all-reduce and all-to-all on every pair of nodes. In each round of measurements, a node is in at most one pair.

Every rank calls `measure_pairs`. All ranks of a pair's two nodes take part, so that all network cards are used.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import group_of
from moe_dist.parallel.round_robin import Pair, PairExchange, is_slow, round_robin, slow_pairs, usual_pair

NAME_BYTES = 128
REPEATS, SECONDS = 100, 0.5  # limits of a collective's repeats: number and total seconds; the best time counts
# A pair that seems slow is measured again several times (looks). It counts as slow only if it is slow in every look. All
# pairs of a slow node are slow. The more pairs seem slow, the fewer looks each pair gets, so that the measurement of a
# large cluster stays within the job's time limit.
FEWEST_LOOKS, MOST_LOOKS, ALL_LOOKS = 3, 10, 100


@dataclass(frozen=True)
class NodeRanks:
    """This rank's global index, and the layout of ranks: `per_node` consecutive ranks on each of `nodes` nodes."""

    rank: int
    nodes: int
    per_node: int

    @property
    def node(self) -> int:
        return self.rank // self.per_node

    def of(self, pair: Pair) -> list[int]:
        return [node * self.per_node + local for node in pair for local in range(self.per_node)]


def measure_pairs(
    ranks: NodeRanks, *, payload_bytes: int, device: torch.device, timeout: float
) -> tuple[dict[Pair, PairExchange], list[Pair]]:
    """Returns the best times of each pair of nodes, and the list of slow pairs. The result is the same on all ranks.

    A pair that seems slow is measured again without other traffic, alternately with a pair of usual speed. A temporary load
    on the network then slows both pairs, and not only one of them. In the all-to-all each rank sends `payload_bytes` to the
    other node, and the all-reduce has as many bytes."""
    task = PairMeasurement(ranks, payload_bytes, device)
    measured: dict[Pair, PairExchange] = {}
    for pairs in round_robin(ranks.nodes):
        groups = {pair: group_of(ranks.of(pair), timeout=timeout) for pair in pairs if ranks.node in pair}
        measured |= task.measure(pairs, groups)
        for group in groups.values():
            dist.destroy_process_group(group)  # otherwise the connections of n (n - 1) / 2 groups would stay open
    doubted = slow_pairs(measured)
    if not doubted:
        return measured, []
    reference = usual_pair(measured)
    # All ranks create these groups. With `alone`, torch would reuse the name of the pair's destroyed group.
    groups = {pair: group_of(ranks.of(pair), timeout=timeout, alone=False) for pair in [reference, *doubted]}
    looks = _num_looks(len(doubted))
    return measured, [pair for pair in doubted if _stays_slow(pair, reference, task, groups, looks)]


def _num_looks(num_pairs: int) -> int:
    return max(FEWEST_LOOKS, min(MOST_LOOKS, ALL_LOOKS // num_pairs))


def _stays_slow(
    pair: Pair, reference: Pair, task: "PairMeasurement", groups: Mapping[Pair, dist.ProcessGroup | None], looks: int
) -> bool:
    for _ in range(looks):
        own, usual = task.measure([pair], groups)[pair], task.measure([reference], groups)[reference]
        if not is_slow(own, than=usual):
            return False
    return True


def names_of_nodes(own: str, ranks: NodeRanks, device: torch.device) -> list[str]:
    """Returns the names of all nodes, in order; `own` is this node's name. All ranks must call it."""
    text = torch.tensor(list(own.encode()[:NAME_BYTES].ljust(NAME_BYTES, b"\0")), dtype=torch.uint8, device=device)
    everywhere = [torch.empty_like(text) for _ in range(ranks.nodes * ranks.per_node)]
    dist.all_gather(everywhere, text)  # sent as bytes, because object collectives use pickle
    return [bytes(row.tolist()).rstrip(b"\0").decode(errors="replace") for row in everywhere[:: ranks.per_node]]


@dataclass(frozen=True)
class PairMeasurement:
    """Measures collectives on pairs of nodes. `measure_pairs` describes the fields."""

    ranks: NodeRanks
    payload_bytes: int
    device: torch.device

    def measure(self, pairs: list[Pair], groups: Mapping[Pair, dist.ProcessGroup | None]) -> dict[Pair, PairExchange]:
        """Measures several `pairs` at the same time; they must share no node. `groups` has the process group of this rank's
        pair. All ranks must call this method. Costs host syncs."""
        seconds = torch.zeros(len(pairs), 2, dtype=torch.float64, device=self.device)
        for number, pair in enumerate(pairs):
            if self.ranks.node in pair:
                group = groups[pair]
                assert group is not None
                seconds[number] = torch.tensor(self._time(pair, group), dtype=torch.float64)
        dist.all_reduce(seconds, dist.ReduceOp.MAX)  # gives the slowest rank's time, and is also a barrier
        return {pair: PairExchange(*values) for pair, values in zip(pairs, seconds.tolist(), strict=True)}

    def _time(self, pair: Pair, group: dist.ProcessGroup) -> tuple[float, float]:
        """Returns this rank's best times, in seconds, of an all-reduce and of an all-to-all."""
        per_node, own = self.ranks.per_node, pair.index(self.ranks.node)
        elements = -(-self.payload_bytes // 4 // per_node) * per_node
        sent, received = torch.zeros(elements, device=self.device), torch.zeros(elements, device=self.device)
        # Each rank sends only to the ranks of the pair's second node, so that only the network is measured.
        splits = [0 if index // per_node == own else elements // per_node for index in range(2 * per_node)]

        def all_reduce() -> None:
            dist.all_reduce(received, group=group)

        def all_to_all() -> None:
            dist.all_to_all_single(received, sent, splits, splits, group=group)

        return _best(all_reduce, group, self.device), _best(all_to_all, group, self.device)


def _best(collective: Callable[[], None], group: dist.ProcessGroup, device: torch.device) -> float:
    collective()  # the first call opens connections
    best = _seconds(collective, device)
    repeats = torch.tensor([min(REPEATS, max(1, int(SECONDS / best)))], device=device)
    dist.all_reduce(repeats, dist.ReduceOp.MIN, group=group)  # so that all ranks use the same number of repeats
    return min([best, *(_seconds(collective, device) for _ in range(int(repeats)))])


def _seconds(collective: Callable[[], None], device: torch.device) -> float:
    began = time.perf_counter()
    collective()
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # a call only queues the collective
    return time.perf_counter() - began
