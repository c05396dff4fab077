"""Whether the nodes of a cluster can take the nodes that a plan wants. Pure functions, the same for every scheduler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_dist.doctor.check_result import CheckResult, error, names, ok
from moe_dist.plan.matching import match

CHECK = "nodes"


@dataclass(frozen=True)
class Offer:
    """A node that the scheduler knows.

    Attributes:
        name: Of the node.
        state: The scheduler's word.
        up: Whether jobs can be placed there, now or when others end.
        traits: What can be asked for: features, or labels as 'name=value'.
        amounts: What can be counted, as {'GPU': 8, 'CPU': 96}.
    """

    name: str
    state: str = "up"
    up: bool = True
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Want:
    """What one node of the plan asks for.

    Attributes:
        ranks: In words, as '0-3'.
        traits: All of which the node must have.
        amounts: As of an offer.
    """

    ranks: str
    traits: frozenset[str] = frozenset()
    amounts: Mapping[str, float] = field(default_factory=dict)

    @property
    def who(self) -> str:
        """Subject and verb of a sentence."""
        return f"ranks {self.ranks} want" if {",", "-"} & set(self.ranks) else f"rank {self.ranks} wants"

    def has_traits(self, offer: Offer) -> bool:
        return self.traits <= offer.traits

    def fits(self, offer: Offer) -> bool:
        return self.has_traits(offer) and all(offer.amounts.get(name, 0) >= much for name, much in self.amounts.items())


def check_fit(wants: Sequence[Want], offers: Sequence[Offer], *, trait_word: str, where: str) -> CheckResult:
    """One line: the first that holds of no such node, none large enough, too few of them up, all well.

    Args:
        trait_word: What the scheduler calls a trait: 'feature' or 'label'.
        where: The part of the cluster that was asked, as "partition 'gpu'".
    """
    for want in wants:
        if not any(want.has_traits(offer) for offer in offers):
            return _no_such_node(want, offers, trait_word, where)
    for want in wants:
        if not any(want.fits(offer) for offer in offers):
            return _too_large(want, [offer for offer in offers if want.has_traits(offer)], trait_word, where)
    up = [offer for offer in offers if offer.up]
    matched = match([[number for number, offer in enumerate(up) if want.fits(offer)] for want in wants])
    if None in matched:
        return _too_few(wants, offers, wants[matched.index(None)], trait_word, where)
    down = [offer for offer in offers if not offer.up]
    less = f"; {names([each.name for each in down])} cannot be used ({down[0].state}), and need not be" if down else ""
    return ok(CHECK, f"{len(wants)} of the {len(up)} nodes of {where} can take the plan{less}")


def _no_such_node(want: Want, offers: Sequence[Offer], trait_word: str, where: str) -> CheckResult:
    for trait in sorted(want.traits):
        if not any(trait in offer.traits for offer in offers):
            there = ", ".join(sorted({each for offer in offers for each in offer.traits})) or "none"
            return error(
                CHECK,
                f"{want.who} a node with the {trait_word} {trait!r}, and no node of {where} has it (it has: {there})",
                "correct placement.groups.<group>.node, or choose another partition or cluster",
            )
    if not offers:
        return error(CHECK, f"{where} has no node at all", "correct the cluster file's partition, or start the cluster")
    both = ", ".join(sorted(want.traits))
    return error(
        CHECK,
        f"{want.who} one node with the {trait_word}s {both}, and no node of {where} has all of them",
        "ask for less in placement.groups.<group>.node",
    )


def _too_large(want: Want, having: Sequence[Offer], trait_word: str, where: str) -> CheckResult:
    missing = [name for name, much in want.amounts.items() if all(o.amounts.get(name, 0) < much for o in having)]
    name = missing[0] if missing else next(iter(want.amounts))
    most = max(offer.amounts.get(name, 0) for offer in having)
    kind = f" with the {trait_word} {', '.join(sorted(want.traits))}" if want.traits else ""
    return error(
        CHECK,
        f"{want.who} {want.amounts[name]:g} {name} on one node, and no node of {where}{kind} has more than {most:g}",
        "ask for fewer ranks a node (cluster file: gpus.per_node, ranks_per_node) or for less a rank (cpus_per_rank)",
    )


def _too_few(wants: Sequence[Want], offers: Sequence[Offer], left: Want, trait_word: str, where: str) -> CheckResult:
    alike = sum(want.traits == left.traits for want in wants)
    fitting = [offer for offer in offers if left.fits(offer)]
    up = sum(offer.up for offer in fitting)
    kind = f" with the {trait_word} {', '.join(sorted(left.traits))}" if left.traits else ""
    down = [f"{offer.name} {offer.state}" for offer in fitting if not offer.up]
    reason = f" ({', '.join(down)})" if down else ""
    return error(
        CHECK,
        f"the plan wants {alike} nodes{kind} (of {len(wants)} in all), and {where} has {up} that can be used{reason}",
        "wait for them, choose another partition or cluster, or lower parallel.edp",
    )
