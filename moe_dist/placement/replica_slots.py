"""Replicas: in some layers a hot (frequently chosen) expert temporarily has slots on other ranks, besides its own slot.

A rank that has a slot of an expert computes its own tokens for this expert. Ranks without a slot of the expert are assigned
to the expert's slots in rotation. Each rank thus knows without communication where its tokens go. The slots of an expert
get about equally many tokens, because all ranks draw tokens from the same data.

Shape letters: L MoE layers, E true experts, R ranks of an EP group.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


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

    def in_layer(self, layer: int) -> ExpertPlacement:
        """Returns a placement with the layer's replicas as additional experts. Each group gets a second group for its
        replicas, which have the ids E, E + 1, ... in the order of `ordered`."""
        first, groups = self.num_experts, list(self.groups)
        slots, ids = [list(each) for each in self.slots], itertools.count(first)
        for group in self.groups:
            of_group = self.ordered(layer, group)
            name = f"{group.name} replicas"
            groups.append(replace(group, name=name, num_experts=len(of_group), num_null=0, first_expert=first))
            first += len(of_group)
            for replica in of_group:
                slots[replica.rank].append(next(ids))
        return ExpertPlacement(tuple(groups), tuple(map(tuple, slots)))

    def ordered(self, layer: int, group: ExpertGroup) -> list[Replica]:
        """Returns a group's replicas in the order in which their weights arrive: sorted by the rank of the expert's own
        slot, then by expert."""
        of_group = (each for each in self.replicas[layer] if each.expert in group.experts)
        return sorted(of_group, key=lambda each: (self.rank_of_expert[each.expert], each))

    def id_of_expert(self, layer: int, source: int) -> list[int]:
        """Returns for each expert the slot that receives the tokens of rank `source`, as an id in `in_layer`."""
        replicas = [each for group in self.groups for each in self.ordered(layer, group)]
        ids = {replica: self.num_experts + place for place, replica in enumerate(replicas)}
        found = list(range(self.num_experts))
        for expert, hosts in self.hosts(layer).items():
            server = servers(hosts, self.num_ranks)[source]
            found[expert] = ids.get(Replica(expert, server), expert)
        return found

    def hosts(self, layer: int) -> dict[int, list[int]]:
        """Returns, for each expert with replicas, its ranks: first the replicas' ranks, last the rank of its own slot."""
        return hosts_of(self.replicas[layer], self.rank_of_expert)

    def by_rank(self, pairs_LE: np.ndarray) -> np.ndarray:
        """See `ExpertPlacement.by_rank`. An expert with replicas has its pairs divided among the ranks of its slots, as if
        all source ranks had equally many of these pairs."""
        found_LR = super().by_rank(pairs_LE).astype(np.float64)
        for layer in range(len(self.replicas)):
            for expert, hosts in self.hosts(layer).items():
                found_LR[layer, self.rank_of_expert[expert]] -= pairs_LE[layer, expert]
                found_LR[layer] += pairs_LE[layer, expert] * shares(hosts, self.num_ranks)
        return found_LR

    def computing_ranks(self, layer: int) -> np.ndarray:
        """See `ExpertPlacement.computing_ranks`. The result differs between layers."""
        found_RE = super().computing_ranks(layer)
        for expert, hosts in self.hosts(layer).items():
            found_RE[:, expert] = servers(hosts, self.num_ranks)
        return found_RE

    @property
    def line(self) -> dict[str, Any]:
        """See `ExpertPlacement.line`."""
        return super().line | {"replicas": [[[*each] for each in layer] for layer in self.replicas]}


def hosts_of(replicas: Iterable[Replica], rank_of_expert: Sequence[int]) -> dict[int, list[int]]:
    """Returns the ranks of each expert with replicas. The rank of the own slot is last, so it serves the fewest ranks."""
    found: dict[int, list[int]] = {}
    for expert, rank in sorted(replicas):
        found.setdefault(expert, []).append(rank)
    return {expert: [*ranks, rank_of_expert[expert]] for expert, ranks in found.items()}


def servers(hosts: Sequence[int], ranks: int) -> list[int]:
    """Returns for each source rank the rank that computes its tokens: itself if in `hosts`, else one of `hosts` in
    rotation."""
    turns = itertools.cycle(hosts)
    return [rank if rank in hosts else next(turns) for rank in range(ranks)]


def shares(hosts: Sequence[int], ranks: int) -> np.ndarray:
    """Returns the fraction of the source ranks that each rank serves, float64 [R]."""
    return np.bincount(servers(hosts, ranks), minlength=ranks) / ranks
