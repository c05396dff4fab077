"""Assigns each planned node to a node of a Ray cluster. Each attempt makes a new assignment. Does not import Ray.

The driver pins each bundle (Ray resources of a rank) to a node, because no strategy of Ray keeps a node's ranks together.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launchers.command import JobPlan, NodePlan, ranks_of
from launchers.fit import Offer, Want, problem
from moe_dist.plan.matching import match

NODE_ID = "ray.io/node-id"  # label that Ray sets on every node
DOMAIN = "ray.io/gpu-domain"  # label of nodes with a common fast interconnect, such as an NVLink rack


@dataclass(frozen=True)
class RayNode:
    """A live node of Ray.

    Attributes:
        labels: All labels, including labels that Ray sets.
        free: Amount of each resource that is not in use.
    """

    node_id: str
    host: str
    address: str
    port: int
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]

    def has(self, labels: Mapping[str, str]) -> bool:
        return all(self.labels.get(name) == value for name, value in labels.items())

    def __str__(self) -> str:
        return f"{self.address} ({','.join(sorted(_pairs(self.labels))) or 'no labels'})"


@dataclass(frozen=True)
class Assignment:
    """The result of `assign`. Exactly one of `nodes`, `problems` and `waits_for` is not empty.

    Attributes:
        job: The plan. If the Ray nodes differ in size, `assign` may have changed how many ranks each node has.
        nodes: A free Ray node for each planned node.
        problems: Requirements that no node of this cluster meets, even when idle.
        waits_for: Planned nodes whose Ray nodes other jobs are using.
    """

    job: JobPlan
    nodes: tuple[RayNode, ...] = ()
    problems: tuple[str, ...] = ()
    waits_for: tuple[NodePlan, ...] = ()


def bundle_of_rank(job: JobPlan, cpus: int | None) -> dict[str, float]:
    """Returns the Ray resources of one rank: `cpus` CPU cores (1 if None), and a GPU if the run needs GPUs."""
    return {"CPU": float(cpus or 1), **({"GPU": 1.0} if job.gpus_per_node else {})}


def nodes_sharing_ep_groups(job: JobPlan, ep: int) -> list[tuple[int, ...]]:
    """Partitions the planned nodes (by index) so that every EP group lies within one part. All nodes of a part must share a
    fast-interconnect domain. An EP group has `ep` consecutive ranks."""
    found: list[set[int]] = []
    for first in range(0, job.world_size, ep):
        nodes = {job.node_of(rank).index for rank in range(first, first + ep)}
        for other in [each for each in found if each & nodes]:
            nodes |= other  # a node with ranks of two EP groups joins the parts of both groups
            found.remove(other)
        found.append(nodes)
    return [tuple(sorted(each)) for each in found]


def assign(
    job: JobPlan,
    nodes: Sequence[RayNode],
    bundle: Mapping[str, float],
    together: Sequence[tuple[int, ...]] = (),
    *,
    most: int | None = None,
) -> Assignment:
    """Chooses for each planned node a Ray node that has the planned node's labels and enough resources for all of its
    ranks. If the Ray nodes are too small or too few for the planned nodes, but have resources for all ranks, distributes
    the ranks again.

    Args:
        nodes: Live nodes; nodes earlier in the sequence are preferred.
        together: Sets of planned nodes; the nodes of a set must share a fast-interconnect domain. Empty without domains.
        most: Largest number of ranks on a node if the ranks are distributed again; None for no limit.
    """

    def chosen(resources: str) -> list[int | None]:
        possible = [
            [n for n, node in enumerate(nodes) if _fits(each, node, getattr(node, resources), bundle)] for each in job.nodes
        ]
        return _match_domains(possible, nodes, together) if any(len(each) > 1 for each in together) else match(possible)

    found = chosen("total")  # counts resources in use as available, because other jobs will free them
    if None in found:
        missing = [each for each, node in zip(job.nodes, found, strict=True) if node is None]
        alone = match([[n for n, node in enumerate(nodes) if _fits(each, node, node.total, bundle)] for each in job.nodes])
        if None not in alone:  # enough nodes exist, but not in one domain
            return Assignment(job, problems=(_domain_problem(missing, nodes),))
        if not together and not any(each.own for each in job.nodes):
            rooms = ([_room(getattr(node, resources), bundle, most) for node in nodes] for resources in ("free", "total"))
            if uneven := next(filter(None, (_fill(job, nodes, room) for room in rooms)), None):
                return assign(uneven, nodes, bundle)
        return Assignment(job, problems=tuple(_node_problem(each, job, nodes, bundle) for each in missing))
    found = chosen("free")  # counts only resources that no other job uses
    if None in found:
        return Assignment(job, waits_for=tuple(each for each, node in zip(job.nodes, found, strict=True) if node is None))
    return Assignment(job, nodes=tuple(nodes[node] for node in found if node is not None))


def _fits(each: NodePlan, node: RayNode, resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    ranks = len(each.ranks)
    return node.has(each.ray_labels) and all(resources.get(name, 0.0) >= ranks * amount for name, amount in bundle.items())


def _room(resources: Mapping[str, float], bundle: Mapping[str, float], most: int | None) -> int:
    room = int(min(resources.get(name, 0.0) / amount for name, amount in bundle.items()))
    return room if most is None else min(room, most)


def _fill(job: JobPlan, nodes: Sequence[RayNode], rooms: Sequence[int]) -> JobPlan | None:
    """Distributes the ranks again: each node, the largest first, gets as many ranks as it has resources for. All ranks of a
    node have equal requirements. Returns None if the nodes lack resources for all ranks."""
    ranks_of: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for each in job.nodes:
        ranks_of.setdefault(tuple(sorted(each.ray_labels.items())), []).extend(each.ranks)
    if job.block > 1 and len(ranks_of) > 1:
        return None
    rooms = [room // job.block * job.block for room in rooms]
    left = sorted((n for n, room in enumerate(rooms) if room), key=lambda n: -rooms[n])
    found: list[NodePlan] = []
    for labels, ranks in sorted(ranks_of.items(), key=lambda item: -len(item[0])):  # ranks without labels come last
        waiting = sorted(ranks)
        for n in [n for n in left if nodes[n].has(dict(labels))]:
            if waiting:
                taken, waiting = waiting[: rooms[n]], waiting[rooms[n] :]
                left.remove(n)
                like = job.node_of(taken[0])
                groups = dict.fromkeys(name for rank in taken for name in job.node_of(rank).groups)
                found.append(replace(like, ranks=tuple(taken), groups=tuple(groups)))
        if waiting:
            return None
    found.sort(key=lambda each: each.ranks)
    return replace(job, nodes=tuple(replace(each, index=index) for index, each in enumerate(found)))


def _match_domains(
    possible: Sequence[Sequence[int]], nodes: Sequence[RayNode], together: Sequence[tuple[int, ...]]
) -> list[int | None]:
    """Matches planned nodes to Ray nodes like `match`, but keeps each set of `together` inside one domain. Handles the
    largest set first, and gives each set the smallest domain that has enough nodes for it. A node without the label DOMAIN
    counts as a separate domain."""
    found: list[int | None] = [None] * len(possible)
    left = set(range(len(nodes)))
    for group in sorted(together, key=len, reverse=True):
        domains: dict[str, set[int]] = {}
        for n in left:
            domain = nodes[n].labels.get(DOMAIN, f"{NODE_ID}={nodes[n].node_id}")
            domains.setdefault(domain, set()).add(n)
        for within in sorted(domains.values(), key=lambda each: (len(each), min(each))):
            matched = match([[n for n in possible[which] if n in within] for which in group])
            if None not in matched:
                for which, node in zip(group, matched, strict=True):
                    found[which] = node
                left -= set(matched)  # pyright: ignore[reportArgumentType]  # no element is None
                break
    return found


def _domain_problem(missing: Sequence[NodePlan], nodes: Sequence[RayNode]) -> str:
    ranks = sorted(rank for each in missing for rank in each.ranks)
    sizes: dict[str, int] = {}
    for node in nodes:
        if DOMAIN in node.labels:
            sizes[node.labels[DOMAIN]] = sizes.get(node.labels[DOMAIN], 0) + 1
    existing = ", ".join(f"{name}: {size} nodes" for name, size in sorted(sizes.items())) or "no labelled node"
    return (
        f"{ranks_of(ranks)}: the nodes of an EP group must share one domain (cluster file: domain_nodes) by the "
        f"label {DOMAIN}; the cluster has {existing}; label the nodes, lower parallel.ep, or set another domain_nodes"
    )


def _node_problem(each: NodePlan, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> str:
    wants = [
        Want(other, _pairs(other.ray_labels), {name: len(other.ranks) * much for name, much in bundle.items()})
        for other in job.nodes
    ]
    offers = [Offer(str(node), _pairs(node.labels), node.total) for node in nodes]
    return problem(wants[each.index], wants, offers, word="label", where="the cluster")


def _pairs(labels: Mapping[str, str]) -> frozenset[str]:
    return frozenset(f"{name}={value}" for name, value in labels.items() if not name.startswith("ray.io/"))
