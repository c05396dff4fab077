"""Which node of a Ray cluster becomes which node of the plan. Pure functions; no Ray here.

Bundles are pinned to the nodes that were chosen, since no strategy of Ray's keeps neighbouring bundles on one node. The
driver chooses again for each attempt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launchers.command import JobPlan, NodePlan
from moe_dist.plan.matching import match

NODE_ID = "ray.io/node-id"  # the label that Ray gives every node
DOMAIN = "ray.io/gpu-domain"  # the label of nodes that share a fastest interconnect, as an NVLink rack
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
        problems: What no node of this cluster can give, however long one waits, in words.
        waits_for: Nodes of the plan whose nodes are taken by others at this moment.
    """

    nodes: tuple[RayNode, ...] = ()
    problems: tuple[str, ...] = ()
    waits_for: tuple[NodePlan, ...] = ()


def bundle_of_rank(job: JobPlan, cpus: int | None) -> dict[str, float]:
    """What a rank takes of its node.

    Args:
        cpus: CPU cores; None is one.
    """
    return {"CPU": float(cpus or 1), **({"GPU": 1.0} if job.gpus_per_node else {})}


def islands(job: JobPlan, ep: int) -> list[tuple[int, ...]]:
    """Nodes of the plan that must share a domain, since an EP group lies on them: index by index, each node in one.

    Args:
        ep: Ranks of an EP group, which are neighbours.
    """
    found: list[set[int]] = []
    for first in range(0, job.world_size, ep):
        nodes = {job.node_of(rank).index for rank in range(first, first + ep)}
        for other in [each for each in found if each & nodes]:
            nodes |= other
            found.remove(other)
        found.append(nodes)
    return [tuple(sorted(each)) for each in found]


def assign(
    job: JobPlan,
    nodes: Sequence[RayNode],
    bundle: Mapping[str, float],
    together: Sequence[tuple[int, ...]] = (),
) -> Assignment:
    """Chooses a node for each node of the plan: one that has its labels, and room for all its ranks.

    Args:
        nodes: The live ones; earlier ones are taken first where several will do.
        bundle: Resources of one rank.
        together: Nodes of the plan that must share a domain; empty where the site declares none.
    """

    def chosen(resources: str) -> list[int | None]:
        possible = [
            [n for n, node in enumerate(nodes) if _fits(each, node, getattr(node, resources), bundle)] for each in job.nodes
        ]
        return _match_domains(possible, nodes, together) if any(len(each) > 1 for each in together) else match(possible)

    found = chosen("total")
    if None in found:
        missing = [each for each, node in zip(job.nodes, found, strict=True) if node is None]
        alone = match([[n for n, node in enumerate(nodes) if _fits(each, node, node.total, bundle)] for each in job.nodes])
        if None not in alone:  # there would be nodes, but no domain has enough of them
            return Assignment(problems=(_domain_problem(missing, nodes),))
        return Assignment(problems=tuple(_fault(each, job, nodes, bundle) for each in missing))
    found = chosen("free")
    if None in found:
        return Assignment(waits_for=tuple(each for each, node in zip(job.nodes, found, strict=True) if node is None))
    return Assignment(nodes=tuple(nodes[node] for node in found if node is not None))


def _fits(each: NodePlan, node: RayNode, resources: Mapping[str, float], bundle: Mapping[str, float]) -> bool:
    ranks = len(each.ranks)
    return node.has(each.ray_labels) and all(resources.get(name, 0.0) >= ranks * amount for name, amount in bundle.items())


def _match_domains(
    possible: Sequence[Sequence[int]], nodes: Sequence[RayNode], together: Sequence[tuple[int, ...]]
) -> list[int | None]:
    """As `match`, with each island inside one domain: the largest first, each in the fullest domain that still takes it.
    A node without the label is in no domain, and takes an island of one node at most."""
    found: list[int | None] = [None] * len(possible)
    left = set(range(len(nodes)))
    for island in sorted(together, key=len, reverse=True):
        domains: dict[str, set[int]] = {}
        for n in left:
            domain = nodes[n].labels.get(DOMAIN, f"{NODE_ID}={nodes[n].node_id}")
            domains.setdefault(domain, set()).add(n)
        for within in sorted(domains.values(), key=lambda each: (len(each), min(each))):
            matched = match([[n for n in possible[which] if n in within] for which in island])
            if None not in matched:
                for which, node in zip(island, matched, strict=True):
                    found[which] = node
                left -= set(matched)  # pyright: ignore[reportArgumentType]  # none of them is None
                break
    return found


def _domain_problem(missing: Sequence[NodePlan], nodes: Sequence[RayNode]) -> str:
    ranks = sorted(rank for each in missing for rank in each.ranks)
    sizes: dict[str, int] = {}
    for node in nodes:
        if DOMAIN in node.labels:
            sizes[node.labels[DOMAIN]] = sizes.get(node.labels[DOMAIN], 0) + 1
    there = ", ".join(f"{name}: {size} nodes" for name, size in sorted(sizes.items())) or "no node has the label"
    return (
        f"{_ranks(ranks)}: an EP group must stay inside one domain (domain_nodes in the cluster file), by the label "
        f"{DOMAIN}; there are {there}; label the nodes, lower parallel.ep, or declare another domain"
    )


def _fault(each: NodePlan, job: JobPlan, nodes: Sequence[RayNode], bundle: Mapping[str, float]) -> str:
    """Why there is no node for this one of the plan: no such label, no room, or too few of them."""
    labels = each.ray_labels
    who = f"{_ranks(each.ranks)}{f' (experts of {_list(each.groups)})' if each.groups else ''}"
    what = f"a Ray node with the label {_pairs(labels)}" if labels else "a Ray node"
    labelled = [node for node in nodes if node.has(labels)]
    wish = f"placement.groups.{each.groups[0]}.node.labels" if each.groups and labels else "the placement"
    if not labelled:
        fix = f"start one with `ray start --labels {_pairs(labels)} ...`, or change {wish}"
        return f"{who}: needs {what}, and no live node has it; there are {_shown(nodes)}; {fix}"
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
