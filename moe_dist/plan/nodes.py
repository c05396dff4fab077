"""Assigns ranks to nodes with the properties that the ranks' expert groups require. All ranks of an EP group stay in
one domain of fast interconnect. All functions are pure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_dist.config.parallel.section import NodeSection, PlacementSection
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertPlacement


@dataclass(frozen=True)
class Demand:
    """The properties that a rank requires of its node."""

    feature: str | None = None  # Slurm feature
    labels: Mapping[str, str] = field(default_factory=dict)  # Ray labels
    owner: str = ""  # expert group to which the node is reserved; '' if there is none


def groups_of_rank(placement: ExpertPlacement, rank: int) -> tuple[str, ...]:
    """Returns the names of the groups that have experts on the rank with the global index `rank`."""
    position = rank % placement.num_ranks
    return tuple(group.name for group in placement.groups if placement.local_experts(position, group))


def demands(section: PlacementSection, placement: ExpertPlacement) -> tuple[Demand, ...]:
    """Returns the demand of each position in an EP group. At most one group makes demands on a rank's node, because only
    pinned groups make demands, and they share no ranks."""
    asked: Mapping[str, NodeSection] = {
        name: group.node for name, group in getattr(section, "groups", {}).items() if group.node != NodeSection()
    }
    found = []
    for position in range(placement.num_ranks):
        (name,) = [name for name in groups_of_rank(placement, position) if name in asked] or [""]
        node = asked.get(name, NodeSection())
        found.append(Demand(node.feature, node.labels, name if node.own else ""))
    return tuple(found)


def pack(
    demand_of_position: Sequence[Demand],
    *,
    edp: int,
    ranks_per_node: int,
    domain_nodes: int | None,
    stage: int | None = None,
) -> list[tuple[Demand, tuple[int, ...]]]:
    """Assigns ranks to nodes, one block of EP groups after another. A block has as many EP groups as fit into a domain of
    fast interconnect. Without domains, all EP groups are one block. If a whole pipeline stage fits into a domain, no stage
    is split between two blocks. Raises ConfigError if one EP group needs more nodes than a domain has.

    Args:
        domain_nodes: Number of nodes in a domain of fast interconnect; None if no domains are declared.
        stage: Number of EP groups in a pipeline stage, a divisor of `edp`. Without a pipeline, `edp` or None.

    Returns:
        The demand and the ranks of each node. A node's ranks are in the order of local ranks. The nodes of a block are in
            the order of their first ranks.
    """
    ep = len(demand_of_position)
    if domain_nodes is None:
        return _pack_block(demand_of_position, range(edp), ranks_per_node)
    needed = len(_pack_block(demand_of_position, range(1), ranks_per_node))
    if needed > domain_nodes:
        kinds = len({(d.feature, *sorted(d.labels.items()), d.owner) for d in demand_of_position})
        raise ConfigError(
            f"parallel.ep={ep}: an EP group needs {needed} nodes of {ranks_per_node} ranks (its ranks ask for {kinds} "
            f"kinds of nodes), but the cluster file has domain_nodes={domain_nodes}; lower parallel.ep, ask less in "
            "placement.groups.<group>.node, or raise domain_nodes, so that rows may cross the network between nodes"
        )
    together = 1
    while together < edp and len(_pack_block(demand_of_position, range(together + 1), ranks_per_node)) <= domain_nodes:
        together += 1
    if stage is not None and together > stage:
        together -= together % stage
    blocks = [range(first, min(first + together, edp)) for first in range(0, edp, together)]
    return [node for block in blocks for node in _pack_block(demand_of_position, block, ranks_per_node)]


def _pack_block(
    demand_of_position: Sequence[Demand], ep_groups: range, ranks_per_node: int
) -> list[tuple[Demand, tuple[int, ...]]]:
    """Places ranks with a demand first, and ranks with different demands on different nodes. Then places ranks without a
    demand: first on nodes with ranks of the same EP group, then on all other used nodes, and last on new nodes."""
    ep = len(demand_of_position)
    nodes: list[tuple[Demand, list[int]]] = []
    ranks = [(group * ep + position, demand) for group in ep_groups for position, demand in enumerate(demand_of_position)]
    for rank, demand in ranks:
        if demand != Demand():
            _place(rank, demand, [node for node in nodes if node[0] == demand], nodes, ranks_per_node)
    for rank, demand in ranks:
        if demand == Demand():
            sharing = [node for node in nodes if not node[0].owner]
            sharing.sort(key=lambda node: all(other // ep != rank // ep for other in node[1]))
            _place(rank, demand, sharing, nodes, ranks_per_node)
    return sorted(((demand, tuple(sorted(held))) for demand, held in nodes), key=lambda node: node[1])


def _place(
    rank: int,
    demand: Demand,
    allowed: Sequence[tuple[Demand, list[int]]],
    nodes: list[tuple[Demand, list[int]]],
    ranks_per_node: int,
) -> None:
    for _, held in allowed:
        if len(held) < ranks_per_node:
            held.append(rank)
            return
    nodes.append((demand, [rank]))
