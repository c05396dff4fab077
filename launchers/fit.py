"""Explains why a cluster's nodes do not match the planned nodes, and checks whether a stop leaves time for a save."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from launchers.command import NodePlan, ranks_of
from moe_dist.errors import ResourceError
from moe_dist.plan.matching import match
from moe_dist.runtime.node.check_result import CheckResult, Level, names, note, ok, warning


@dataclass(frozen=True)
class Offer:
    """A node of the cluster.

    Attributes:
        traits: The node's Slurm features, or its labels in the form 'name=value'.
        down: The reason why no job can run on the node. Empty if jobs can run there, now or after other jobs end.
    """

    name: str
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)
    down: str = ""


@dataclass(frozen=True)
class Want:
    """A planned node, with the traits and the amounts of resources that the assigned node must have."""

    node: NodePlan
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)

    def fits(self, offer: Offer) -> bool:
        enough = all(offer.amounts.get(name, 0) >= much for name, much in self.amounts.items())
        return self.traits <= offer.traits and enough


def unmet(wants: Sequence[Want], offers: Sequence[Offer], *, word: str, where: str) -> list[str]:
    """Returns an error message for each planned node that no node of the cluster fits. `problem` explains the arguments."""
    up = [offer for offer in offers if not offer.down]
    found = match([[number for number, offer in enumerate(up) if want.fits(offer)] for want in wants])
    return [problem(w, wants, offers, word=word, where=where) for w, at in zip(wants, found, strict=True) if at is None]


def problem(want: Want, wants: Sequence[Want], offers: Sequence[Offer], *, word: str, where: str) -> str:
    """Returns the reason why a planned node matches no node of the cluster: no node has its traits, or the nodes with its
    traits are too small or too few.

    Args:
        word: The scheduler's word for a trait: 'feature' or 'label'.
        where: Name of the part of the cluster, such as "partition 'gpu'".
    """
    groups = want.node.groups
    who = ranks_of(want.node.ranks) + (f" (experts of {', '.join(groups)})" if groups else "")
    kind = f" with the {word} {' and '.join(sorted(want.traits))}" if want.traits else ""
    having = [offer for offer in offers if want.traits <= offer.traits]
    if not having:
        existing = sorted({trait for offer in offers for trait in offer.traits})
        keys = " and ".join(f"placement.groups.{group}.node" for group in groups) or "placement.groups.<group>.node"
        fix = f"change {keys}, or add a node with this {word}" if want.traits else "add nodes"
        return f"{who}: {where} has no node{kind}; its nodes have {names(existing) or 'none'}; {fix}"
    fitting = [offer for offer in having if want.fits(offer)]
    if not fitting:
        most = {name: max(offer.amounts.get(name, 0) for offer in having) for name in want.amounts}
        return (
            f"{who}: needs {_amounts(want.amounts)} on one node, but the largest of {where}{kind} has {_amounts(most)}; "
            "put fewer ranks on a node (cluster file: gpus.per_node, ranks_per_node, cpus_per_rank), or add larger ones"
        )
    up = [offer.name for offer in fitting if not offer.down]
    down = "".join(f", {offer.name} is {offer.down}" for offer in fitting if offer.down)
    alike = sum(other.traits == want.traits for other in wants)
    return (
        f"{who}: the plan needs {alike} nodes{kind}, but {where} has {len(up)} that can be used "
        f"({names(up) or 'none'}{down}); add nodes or wait for them, put more ranks on a node, or lower parallel.edp"
    )


def fit_result(problems: Sequence[str], used: int, existing: int, where: str) -> CheckResult:
    """Returns the result of the doctor's check of the nodes."""
    if not problems:
        return ok("nodes", f"the plan fits on {used} of the {existing} nodes of {where}")
    more = f" ({len(problems) - 1} more nodes of the plan likewise)" if len(problems) > 1 else ""
    return CheckResult("nodes", Level.ERROR, problems[0] + more, verdict=ResourceError.exit_code)


def check_graces(graces: Mapping[str, float], save_seconds: float | None) -> CheckResult:
    """Compares every grace period with the measured save time."""
    shown = ", ".join(f"{seconds:g} s {when}" for when, seconds in graces.items())
    if save_seconds is None:
        return note("stop grace", f"{shown}; this run has no save yet to compare with")
    short = {when: seconds for when, seconds in graces.items() if seconds < save_seconds}
    if short:
        when, seconds = min(short.items(), key=lambda each: each[1])
        text = f"{seconds:g} s {when}, but the last saves took up to {save_seconds:.1f} s"
        fix = "increase it, or save more often (checkpoint.every): a stop would lose the steps since the last checkpoint"
        return warning("stop grace", text, fix)
    return ok("stop grace", f"{shown}; the last saves took up to {save_seconds:.1f} s")


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{amount:g} {name}" for name, amount in resources.items())
