"""Replicas: in some layers of a trace a hot (frequently chosen) expert has slots on other ranks, besides its own slot. This
version makes no replicas. Reports read them from traces that an earlier version wrote.

A rank that has a slot of an expert computes its own tokens for this expert. The ranks without a slot of the expert are
assigned to the expert's slots in turn. Each rank thus knows without communication where its tokens go. The slots of an
expert get about equally many tokens, because all ranks draw tokens from the same data.

Shape letters: L MoE layers, E true experts, R ranks of an EP group.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement


class Replica(NamedTuple):
    """A further slot, on `rank`, for the expert with the logical id `expert`. The expert's own slot is on another rank."""

    expert: int
    rank: int


@dataclass(frozen=True)
class PlacementWithReplicas(ExpertPlacement):
    """A placement whose experts may have replicas. `slots` contains each expert's own slot, in which the expert is trained
    and saved. `replicas` has one sorted tuple of replicas for each layer; the tuple may be empty. Raises ConfigError as
    `ExpertPlacement` does, also if a layer's replicas are not sorted, or if a replica is on the rank of its expert's own
    slot."""

    replicas: tuple[tuple[Replica, ...], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for layer, each in enumerate(self.replicas):
            places = {(e, r) for e, r in each if 0 <= e < self.num_experts and 0 <= r < self.num_ranks}
            if tuple(sorted(places)) != each or any(self.rank_of_expert[expert] == rank for expert, rank in each):
                raise ConfigError(f"replicas of layer {layer}: {each} must be sorted, each on a rank without the expert")

    def hosts(self, layer: int) -> dict[int, list[int]]:
        """Returns, for each expert with replicas, its ranks: first those of the replicas, last the rank of its own slot,
        which therefore serves the fewest ranks."""
        found: dict[int, list[int]] = {}
        for expert, rank in self.replicas[layer]:
            found.setdefault(expert, []).append(rank)
        return {expert: [*ranks, self.rank_of_expert[expert]] for expert, ranks in found.items()}

    def by_rank(self, pairs_LE: np.ndarray) -> np.ndarray:
        """See `ExpertPlacement.by_rank`. An expert with replicas has its pairs divided among the ranks of its slots, as if
        all source ranks had equally many of these pairs."""
        found_LR, ranks = super().by_rank(pairs_LE).astype(np.float64), self.num_ranks
        for layer in range(len(self.replicas)):
            for expert, hosts in self.hosts(layer).items():
                found_LR[layer, self.rank_of_expert[expert]] -= pairs_LE[layer, expert]
                found_LR[layer] += pairs_LE[layer, expert] * np.bincount(servers(hosts, ranks), minlength=ranks) / ranks
        return found_LR

    def computing_ranks(self, layer: int) -> np.ndarray:
        """See `ExpertPlacement.computing_ranks`. The result differs between layers."""
        found_RE = super().computing_ranks(layer)
        for expert, hosts in self.hosts(layer).items():
            found_RE[:, expert] = servers(hosts, self.num_ranks)
        return found_RE


def servers(hosts: Sequence[int], ranks: int) -> list[int]:
    """Returns for each source rank the rank that computes its tokens: itself if in `hosts`, else one of `hosts` in turn."""
    turns = itertools.cycle(hosts)
    return [rank if rank in hosts else next(turns) for rank in range(ranks)]
