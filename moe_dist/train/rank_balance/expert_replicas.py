"""Gives experts replicas on other ranks of their EP group. This file sends no weights; each forward pass sends the weights
of replicas (`moe/experts/replicas.py`). Shape letter: E true experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.config.dispatchers.base import DispatchSection
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.replicas import ReplicaWeights
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.replica_slots import PlacementWithReplicas


class ReplicaPlanner:
    """Replaces a dispatcher's planner, so that this rank's tokens go to the replicas that serve this rank
    (`placement/replica_slots.py`). Each layer's planner treats a replica as a separate expert.

    Args:
        plain: The planner that the dispatcher had before. It plans layers without replicas.
        of_layer: Maps a layer's name to two values: the id of each expert's slot (int64 [E + 1]; the last id is for absent
            pairs), and a planner for these slots, of the same kind as `plain`.
    """

    def __init__(self, plain: Any, of_layer: Mapping[str, tuple[Tensor, Any]]) -> None:
        self._plain, self._of_layer = plain, of_layer

    def plan(self, assignments: Assignments, num_tokens: int, layer: str) -> Any:
        if layer not in self._of_layer:
            return self._plain.plan(assignments, num_tokens, layer)
        slot_E, planner = self._of_layer[layer]
        # absent pairs have the index -1, which selects the last id
        return planner.plan(assignments._replace(expert_N=slot_E[assignments.expert_N]), num_tokens, layer)

    def chunk_lengths(self, num_tokens: int) -> tuple[int, ...]:
        """Does the same as `DispatchPlanner.chunk_lengths`. The lengths are equal in all layers."""
        return self._plain.chunk_lengths(num_tokens)


def give_replicas(parallel: ParallelModel, section: DispatchSection, context: DispatchContext) -> None:
    """Replaces the experts' replicas in all MoE layers by those in `context.placement`. All ranks must call this between
    the same two steps. Dispatchers with the capability `replicas` make all plans with their attribute `planner`."""
    mesh, layers, placement = parallel.mesh, parallel.model.moe_modules(), context.placement
    assert isinstance(placement, PlacementWithReplicas)
    # `context.all_to_all` may compute checksums of rows, and an expert is too long for them, so it is not used here.
    wire = AllToAll(mesh.ep, context.all_to_all.comm_stats, mesh.tracker)
    dispatcher: Any = section.build(context)
    of_layer: dict[str, tuple[Tensor, Any]] = {}
    for number, layer in enumerate(layers):
        assert isinstance(layer.experts, Experts), "the configuration refuses replicas of other experts"
        layer.dispatcher = dispatcher
        layer.experts.replicas = ReplicaWeights.of(placement, number, str(layer.name), wire)
        if placement.replicas[number]:
            slot_E = torch.tensor([*placement.id_of_expert(number, wire.rank), ABSENT], device=mesh.device)
            planner = section.build(replace(context, placement=placement.in_layer(number))).planner
            of_layer[str(layer.name)] = slot_E, planner
    dispatcher.planner = ReplicaPlanner(dispatcher.planner, of_layer)
