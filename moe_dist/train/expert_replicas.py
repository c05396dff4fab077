"""Gives experts replicas on other ranks of their EP group. No weights are sent here: each forward sends the weights of
replicas (`moe/replicas.py`)."""

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.moe.dispatch.replicas import ReplicaDispatcher
from moe_dist.moe.replicas import ExpertsWithReplicas, ReplicaWeights
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.replicas import PlacementWithReplicas
from moe_dist.train.build_dispatch import DispatchParts


def give_replicas(parallel: ParallelModel, parts: DispatchParts, placement: PlacementWithReplicas) -> None:
    """Replaces the experts' replicas of all MoE layers by the replicas in `placement`. All ranks call the function between
    two steps."""
    mesh, layers = parallel.mesh, parallel.model.moe_modules()
    # `parts.all_to_all` is not used, because its checksums of rows may be switched on, and an expert is too long for
    # checksums.
    wire = AllToAll(mesh.ep, parts.all_to_all.comm_stats, mesh.tracker)
    names = [str(layer.name) for layer in layers]
    dispatcher = ReplicaDispatcher(placement, parts.all_to_all, layers=names, device=mesh.device, **parts.options)
    for number, layer in enumerate(layers):
        assert isinstance(layer.experts, ExpertsWithReplicas), "the configuration refuses replicas of other experts"
        layer.dispatcher = dispatcher  # pyright: ignore[reportArgumentType]
        layer.experts.replicas = ReplicaWeights.of(placement, number, names[number], wire)
