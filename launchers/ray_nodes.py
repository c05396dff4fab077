"""Which node of a Ray cluster becomes which node of the plan. Pure functions; no Ray here.

Bundles are pinned to the nodes that were chosen, since no strategy of Ray's keeps neighbouring bundles on one node. The
driver chooses again for each attempt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launchers.command import JobPlan, NodePlan

NODE_ID = "ray.io/node-id"  # the label that Ray gives every node
_SHOWN = 8


@dataclass(frozen=True)
class RayNode:
    """A live node.

    Attributes:
        node_id: Ray's name of it.
        host: Its host name.
        address, port: Where its raylet listens.
        labels: Those of Ray among them.
        total: Resources, by name.
        free: What of them nobody has at this moment.
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
        own = {name: value for name, value in self.labels.items() if not name.startswith("ray.io/")}
        return f"{self.address} ({_pairs(own) or 'no labels'})"


@dataclass(frozen=True)
class Assignment:
    """Nodes for a plan.

    Attributes:
        nodes: For each node of the plan, if all are there and free.
        faults: What no node of this cluster can give, however long one waits, in words.
        waits_for: Nodes of the plan whose nodes are taken by others at this moment.
    """

    nodes: tuple[RayNode, ...] = ()
    faults: tuple[str, ...] = ()
    waits_for: tuple[NodePlan, ...] = ()


def bundle_of_rank(job: JobPlan, cpus: int | None) -> dict[str, float]:
    """What a rank takes of its node.

    Args:
        cpus: CPU cores; None is one.
    """
    return {"CPU": float(cpus or 1), **({"GPU": 1.0} if job.gpus_per_node else {})}


def assign(job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> Assignment:
    """Chooses a node for each node of the plan: one that has its labels, and room for all its ranks.

    Args:
        nodes: The live ones; earlier ones are taken first where several will do.
        bundle: Resources of one rank.
    """
    possible = [[n for n, node in enumerate(nodes) if _fits(each, node, node.total, bundle)] for each in job.nodes]
    found = _match(possible)
    if None in found:
        missing = [each for each, node in zip(job.nodes, found, strict=True) if node is None]
        return Assignment(faults=tuple(_fault(each, job, nodes, bundle) for each in missing))
    free = [
        [n for n in able if _fits(each, nodes[n], nodes[n].free, bundle)]
        for each, able in zip(job.nodes, possible, strict=True)
    ]
    found = _match(free)
    if None in found:
        return Assignment(waits_for=tuple(each for each, node in zip(job.nodes, found, strict=True) if node is None))
    return Assignment(nodes=tuple(nodes[node] for node in found if node is not None))


def _fits(each: NodePlan, node: RayNode, resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    ranks = len(each.ranks)
    return node.has(each.ray_labels) and all(resources.get(name, 0.0) >= ranks * amount for name, amount in bundle.items())


def _match(possible: Sequence[Sequence[int]]) -> list[int | None]:
    """A node for as many as there can be, none twice (augmenting paths)."""
    taken: dict[int, int] = {}

    def take(which: int, tried: set[int]) -> bool:
        for node in sorted(possible[which], key=lambda node: node in taken):  # nobody moves without need
            if node not in tried:
                tried.add(node)
                if node not in taken or take(taken[node], tried):
                    taken[node] = which
                    return True
        return False

    for which in range(len(possible)):
        take(which, set())
    node_of = {which: node for node, which in taken.items()}
    return [node_of.get(which) for which in range(len(possible))]


def _fault(each: NodePlan, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> str:
    """Why there is no node for this one of the plan: no such label, no room, or too few of them."""
    labels = each.ray_labels
    who = f"{_ranks(each.ranks)}{f' (experts of {_list(each.groups)})' if each.groups else ''}"
    what = f"a Ray node with the label {_pairs(labels)}" if labels else "a Ray node"
    labelled = [node for node in nodes if node.has(labels)]
    wish = f"placement.groups.{each.groups[0]}.node.labels" if each.groups and labels else "the placement"
    if not labelled:
        way_out = f"start one with `ray start --labels {_pairs(labels)} ...`, or change {wish}"
        return f"{who}: needs {what}, and no live node has it; there are {_shown(nodes)}; {way_out}"
    need = {name: len(each.ranks) * amount for name, amount in bundle.items()}
    roomy = [node for node in labelled if _fits(each, node, node.total, bundle)]
    if not roomy:
        most = {name: max(node.total.get(name, 0.0) for node in labelled) for name in need}
        return (
            f"{who}: needs {_amounts(need)} on {what}, and the largest has {_amounts(most)}; put fewer ranks on a node "
            "(ranks_per_node, gpus.per_node and cpus_per_rank in the cluster file), or start larger nodes"
        )
    alike = sum(other.ray_labels == labels for other in job.nodes)
    return (
        f"{who}: needs {what} and {_amounts(need)} free of other ranks; the plan has {alike} such nodes, the cluster "
        f"{len(roomy)}: {_shown(roomy)}; start more, or put more ranks on a node (ranks_per_node and gpus.per_node in the "
        "cluster file)"
    )


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names)


def _pairs(labels: Mapping[str, str]) -> str:
    return ",".join(f"{name}={value}" for name, value in labels.items())


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())


def _shown(nodes: Sequence[RayNode]) -> str:
    more = f" and {len(nodes) - _SHOWN} more" if len(nodes) > _SHOWN else ""
    return (", ".join(map(str, nodes[:_SHOWN])) or "none") + more
