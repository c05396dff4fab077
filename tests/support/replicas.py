"""Makes replicas of a layout's experts."""

from collections.abc import Sequence

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.parallel.mesh import Mesh
from moe_dist.parallel.parallelize import ParallelModel
from moe_dist.placement.placement import ExpertPlacement
from moe_dist.placement.replica_slots import PlacementWithReplicas, Replica
from moe_dist.train.build.dispatch import dispatch_context
from moe_dist.train.rank_balance.levers import give_replicas
from tests.support.layouts import HIDDEN_DIM, Layout, config_of


def on_others(placement: ExpertPlacement, expert: int, number: int) -> list[Replica]:
    """Returns replicas of an expert on the `number` ranks that follow the expert's own rank."""
    home, ranks = placement.rank_of_expert[expert], placement.num_ranks
    return sorted(Replica(expert, (home + after) % ranks) for after in range(1, number + 1))


def of_both_groups(placement: ExpertPlacement) -> list[Replica]:
    """Returns replicas of the first text expert on all ranks, and of the first image expert on one more rank."""
    text, image = (group.first_expert for group in placement.groups)
    return sorted(on_others(placement, text, placement.num_ranks - 1) + on_others(placement, image, 1))


def replicate(
    parallel: ParallelModel,
    layout: Layout,
    placement: ExpertPlacement,
    comm_stats: CommStats,
    replicas: Sequence[Sequence[Replica]],
) -> None:
    """Gives the experts of each layer their replicas."""
    mesh: Mesh = parallel.mesh
    new = PlacementWithReplicas(placement.groups, placement.slots, tuple(map(tuple, replicas)))
    nodes, wire = (mesh.inter_node, mesh.intra_node), AllToAll(mesh.ep, comm_stats)
    section = config_of(layout).parallel
    give_replicas(parallel, section.dispatch, dispatch_context(section, new, wire, HIDDEN_DIM, nodes))
