"""Gives experts replicas on other ranks of their EP group. No weights are sent here: each forward sends the weights of
replicas (`moe/experts/replicas.py`)."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.replica_planner import ReplicaPlanner
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.experts.replicas import ReplicaWeights
from moe_dist.moe.routing.types import ABSENT
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.replica_slots import PlacementWithReplicas
from moe_dist.train.build.dispatch import WITH_PLANNER, DispatchParts


def give_replicas(parallel: ParallelModel, parts: DispatchParts, placement: PlacementWithReplicas) -> None:
    """Replaces the experts' replicas of all MoE layers by the replicas in `placement`. All ranks call the function between
    two steps."""
    mesh, layers = parallel.mesh, parallel.model.moe_modules()
    # `parts.all_to_all` is not used, because its checksums of rows may be switched on, and an expert is too long for
    # checksums.
    wire = AllToAll(mesh.ep, parts.all_to_all.comm_stats, mesh.tracker)
    make = WITH_PLANNER[parts.parallel.dispatch.kind]
    dispatcher: Any = make(replace(parts, placement=placement))
    of_layer: dict[str, tuple[Tensor, Any]] = {}
    for number, layer in enumerate(layers):
        assert isinstance(layer.experts, Experts), "the configuration refuses replicas of other experts"
        layer.dispatcher = dispatcher
        layer.experts.replicas = ReplicaWeights.of(placement, number, str(layer.name), wire)
        if placement.replicas[number]:
            slot_E = torch.tensor([*placement.id_of_expert(number, wire.rank), ABSENT], device=mesh.device)
            planner = make(replace(parts, placement=placement.in_layer(number))).planner
            of_layer[str(layer.name)] = slot_E, planner
    dispatcher.planner = ReplicaPlanner(dispatcher.planner, of_layer)
