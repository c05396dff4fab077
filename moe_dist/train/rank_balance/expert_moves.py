"""Moves experts (their weights and moments, bit for bit) between the ranks of an EP group.

A move never changes the number of a group's experts that a rank has. Parameters and moments therefore keep their shapes and
memory, and only their values change. A move changes no file: after a crash the run resumes from its last checkpoint.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import MOVED_EXPERTS
from moe_dist.optim.optimizer import materialise_moments, moments_of
from moe_dist.parallel.initialise import set_whole
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.parameter_names import EXPERTS, NamedParameter
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


@dataclass(frozen=True)
class Route:
    """The experts that one rank sends and receives when one group's experts move.

    Attributes:
        send: Indices of the leaving experts in this rank's stack of the group, ordered by the experts' new ranks.
        splits: Numbers of experts that this rank sends to and receives from each rank.
        take: For each expert of the new stack, its index in the old stack followed by the received experts.
    """

    send: list[int]
    splits: Splits
    take: list[int]

    @classmethod
    def of(cls, old: ExpertPlacement, new: ExpertPlacement, group: ExpertGroup, rank: int) -> "Route":
        """Makes the route of rank `rank`. Sender and receiver both order the exchanged experts by logical id."""
        others = [each for each in range(old.num_ranks) if each != rank]
        before, after = old.local_experts(rank, group), new.local_experts(rank, group)
        leave = {to: [each for each in new.local_experts(to, group) if each in before] for to in others}
        arrive = {source: [each for each in after if old.rank_of_expert[each] == source] for source in others}
        pool = [*before, *(each for experts in arrive.values() for each in experts)]
        return cls(
            [before.index(each) for experts in leave.values() for each in experts],
            Splits(*(tuple(len(part.get(each, ())) for each in range(old.num_ranks)) for part in (leave, arrive))),
            [pool.index(each) for each in after],
        )


def same_shapes(one: ExpertPlacement, other: ExpertPlacement) -> bool:
    """Returns whether each rank has equally many experts of each group in both placements. A move requires this."""
    if one.groups != other.groups or one.num_ranks != other.num_ranks:
        return False
    ranks = range(one.num_ranks)
    return all(len(one.local_experts(r, g)) == len(other.local_experts(r, g)) for g in one.groups for r in ranks)


@torch.no_grad()
def move_experts(parallel: ParallelModel, optimizer: Optimizer, old: ExpertPlacement, new: ExpertPlacement) -> None:
    """Moves weights and moments of all experts to the ranks that `new` gives them. Collective over the EP groups. Needs
    memory for one stacked tensor of experts at a time, which is not sharded even if FSDP2 shards the tensor over edp."""
    assert same_shapes(old, new), f"{old.slots} cannot become {new.slots}"
    mesh = parallel.mesh
    wire = AllToAll(mesh.ep, CommStats(), mesh.tracker)
    moved = {g.name: g for g in old.groups if any(old.rank_of_expert[e] != new.rank_of_expert[e] for e in g.experts)}
    routes = {name: Route.of(old, new, group, mesh.ep_rank) for name, group in moved.items()}
    materialise_moments(optimizer)
    for module in parallel.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    with mesh.tracker.among("a move of experts"):
        for named in parallel.parameters:
            if named.role not in EXPERTS or (route := routes.get(named.name.rsplit(".", 2)[1])) is None:
                continue
            for stack in _tensors(named, optimizer):
                whole = stack.full_tensor() if isinstance(stack, DTensor) and stack.shape[0] else stack
                arrived = wire.exchange(whole[route.send], route.splits, name=MOVED_EXPERTS, layer=named.name)
                if stack.shape[0]:
                    set_whole(stack, torch.cat([whole, arrived])[route.take])


def _tensors(named: NamedParameter, optimizer: Optimizer) -> Iterator[Tensor]:
    """Yields a stacked tensor of experts, then the tensor's moments. On a rank without experts all these are empty."""
    yield named.parameter.detach()
    state = optimizer.state.get(named.parameter, {})
    if named.parameter.requires_grad:
        for moment in moments_of(named, orthogonal=getattr(optimizer, "orthogonal", False)):
            yield state.get(moment, named.parameter.detach())
