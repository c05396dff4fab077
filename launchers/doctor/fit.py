"""Checks whether a cluster has the nodes that a plan requires. The functions are pure and know no scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_dist.plan.matching import match
from moe_dist.runtime.node.check_result import CheckResult, error, names, ok

CHECK = "nodes"


@dataclass(frozen=True)
class Offer:
    """A node of the cluster.

    Attributes:
        state: The node's state, as the scheduler names it.
        up: True if jobs can run on the node, now or after other jobs end.
        traits: Features, or labels in the form 'name=value'.
        amounts: Countable resources, such as {'GPU': 8, 'CPU': 96}.
    """

    name: str
    state: str = "up"
    up: bool = True
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Want:
    """Requirements of one planned node.

    Attributes:
        ranks: The ranks on the node as text, such as '0-3'.
        traits: Features or labels that the node must have.
        amounts: Smallest amount of each resource that the node must have.
    """

    ranks: str
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """Returns the subject and verb of a message, such as 'ranks 0-3 need'."""
        return f"ranks {self.ranks} need" if {",", "-"} & set(self.ranks) else f"rank {self.ranks} needs"

    def has_traits(self, offer: Offer) -> bool:
        return self.traits <= offer.traits

    def fits(self, offer: Offer) -> bool:
        return self.has_traits(offer) and all(offer.amounts.get(name, 0) >= much for name, much in self.amounts.items())


def check_fit(wants: Sequence[Want], offers: Sequence[Offer], *, trait_word: str, where: str) -> CheckResult:
    """Reports the first problem: no node has the traits of a planned node, no node with these traits has the resources, or
    too few such nodes are `up`. Reports OK if there is no problem.

    Args:
        trait_word: The scheduler's word for a trait: 'feature' or 'label'.
        where: Part of the cluster, such as "partition 'gpu'".
    """
    for want in wants:
        if not any(want.has_traits(offer) for offer in offers):
            return _no_such_node(want, offers, trait_word, where)
    for want in wants:
        if not any(want.fits(offer) for offer in offers):
            return _too_large(want, [offer for offer in offers if want.has_traits(offer)], trait_word, where)
    up = [offer for offer in offers if offer.up]
    # planned node -> usable node, by maximum bipartite matching
    matched = match([[number for number, offer in enumerate(up) if want.fits(offer)] for want in wants])
    if None in matched:
        return _too_few(wants, offers, wants[matched.index(None)], trait_word, where)
    down = [offer for offer in offers if not offer.up]
    less = f"; {names([each.name for each in down])} ({down[0].state}) cannot be used, and is not needed" if down else ""
    return ok(CHECK, f"the plan fits on {len(wants)} of the {len(up)} nodes of {where}{less}")


def _no_such_node(want: Want, offers: Sequence[Offer], trait_word: str, where: str) -> CheckResult:
    for trait in sorted(want.traits):
        if not any(trait in offer.traits for offer in offers):
            existing = ", ".join(sorted({each for offer in offers for each in offer.traits})) or "none"
            return error(
                CHECK,
                f"{want.who} a node with the {trait_word} {trait!r}, but no node of {where} has it (existing: {existing})",
                "correct placement.groups.<group>.node, or choose another partition or cluster",
            )
    if not offers:
        return error(CHECK, f"{where} has no nodes", "correct the cluster file's partition, or start the cluster")
    both = ", ".join(sorted(want.traits))
    text = f"{want.who} one node with the {trait_word}s {both}, but no node of {where} has all of them"
    fix = f"require fewer {trait_word}s in placement.groups.<group>.node"
    return error(CHECK, text, fix)


def _too_large(want: Want, having: Sequence[Offer], trait_word: str, where: str) -> CheckResult:
    missing = [name for name, much in want.amounts.items() if all(o.amounts.get(name, 0) < much for o in having)]
    name = missing[0] if missing else next(iter(want.amounts))
    most = max(offer.amounts.get(name, 0) for offer in having)
    kind = f" with the {trait_word} {', '.join(sorted(want.traits))}" if want.traits else ""
    text = f"{want.who} {want.amounts[name]:g} {name} on one node, but no node of {where}{kind} has more than {most:g}"
    fix = "use fewer ranks per node (cluster file: gpus.per_node, ranks_per_node) or fewer cores per rank (cpus_per_rank)"
    return error(CHECK, text, fix)


def _too_few(wants: Sequence[Want], offers: Sequence[Offer], left: Want, trait_word: str, where: str) -> CheckResult:
    alike = sum(want.traits == left.traits for want in wants)
    fitting = [offer for offer in offers if left.fits(offer)]
    up = sum(offer.up for offer in fitting)
    kind = f" with the {trait_word} {', '.join(sorted(left.traits))}" if left.traits else ""
    down = [f"{offer.name} {offer.state}" for offer in fitting if not offer.up]
    reason = f" ({', '.join(down)})" if down else ""
    text = f"the plan needs {alike} nodes{kind} (of {len(wants)} in all), but {where} has {up} that can be used{reason}"
    fix = "wait for them, choose another partition or cluster, or lower parallel.edp"
    return error(CHECK, text, fix)
