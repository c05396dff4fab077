"""Estimates the costs of pinned placement (expert groups on ranks of their own) and interleaved placement (every group on
all ranks) for the training data's token mix (its tokens of each modality).

All figures are expectations under uniform routing: a token's k choices are a random subset of its expert group's n + m
router columns (n true experts, m others). Every rank has the same token mix. Shape letters: R ranks of an EP group, D
hidden size, F an expert's width."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import comb

from rich.console import Console
from rich.table import Table

from moe_dist.config.parallel_schema import InterleavedSection, PinnedSection
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.policies import make_placement

_SAME = 1e-9  # relative difference below which two plans are equal


@dataclass(frozen=True)
class PlacementPlan:
    """One placement and its expected costs per token."""

    name: str  # placement policy
    placement: ExpertPlacement
    load_R: tuple[float, ...]  # sum of ffn_dim over each rank's (token, expert) pairs; times 6 D: forward FLOPs
    remote_R: tuple[float, ...]  # rows that each rank receives from other ranks, one per (token, rank)

    @property
    def efficiency(self) -> float:
        """Returns mean load / maximum load of the ranks. The throughput is at most this ratio times the throughput under
        equal loads."""
        return sum(self.load_R) / len(self.load_R) / max(self.load_R)

    @property
    def remote_rows_per_token(self) -> float:
        """Returns the rows per token that ranks send to other ranks. A row has D x itemsize bytes, and is sent four times:
        in dispatch, in combine, and in the backward of both."""
        return sum(self.remote_R)


@dataclass(frozen=True)
class PlanComparison:
    """The costs of pinned and of interleaved placement of the same groups."""

    plans: tuple[PlacementPlan, ...]  # a plan for each of the two policies that is possible
    missing: Mapping[str, str]  # impossible policy -> reason

    @property
    def fastest_compute(self) -> PlacementPlan | None:
        """Returns the plan whose busiest rank has the least work; None on a tie."""
        return _least(self.plans, [max(plan.load_R) for plan in self.plans])

    @property
    def least_traffic(self) -> PlacementPlan | None:
        """Returns the plan that sends the fewest rows; None on a tie."""
        return _least(self.plans, [plan.remote_rows_per_token for plan in self.plans])

    def verdict(self, *, itemsize: int = 2) -> str:
        """Returns a sentence that names the better plan and its advantage. `itemsize`: bytes of a sent row's element."""
        if len(self.plans) < 2:
            return "; ".join(f"{name} is not possible: {why}" for name, why in self.missing.items())
        compute, traffic = self.fastest_compute, self.least_traffic
        words = [
            _gain("busiest rank", compute, [(p, max(p.load_R)) for p in self.plans], "less work"),
            _gain("exchange", traffic, [(p, p.remote_rows_per_token) for p in self.plans], "fewer rows"),
        ]
        winners = {plan.name for plan in (compute, traffic) if plan}
        if len(winners) == 1:
            words.append(f"{winners.pop()} wins")
        elif compute and traffic:
            words.append(_trade(compute, traffic, itemsize))
        return "; ".join(words)


def expected_plan(placement: ExpertPlacement, token_mix: Mapping[str, int], *, name: str) -> PlacementPlan:
    """Returns the expected load and traffic of a placement.

    A token with k of n + m choices takes at least one of a rank's e experts with probability 1 - C(n + m - e, k) / C(n + m,
    k), or 1 - (1 - c)^e if each expert takes a share c of the tokens. The token comes from another rank with probability (R
    - 1) / R.
    """
    ranks = placement.num_ranks
    load, remote = [0.0] * ranks, [0.0] * ranks
    for group, share in zip(placement.groups, group_shares(placement.groups, token_mix), strict=True):
        for rank in range(ranks):
            here = len(placement.local_experts(rank, group))
            load[rank] += share * group.expected_experts_per_token * here / group.num_experts * group.ffn_dim
            remote[rank] += share * reached(group, here) * (ranks - 1) / ranks
    return PlacementPlan(name, placement, tuple(load), tuple(remote))


def reached(group: ExpertGroup, here: int) -> float:
    """Returns the probability that a token of the group takes at least one of `here` given experts."""
    if group.capacity is not None:
        return 1 - (1 - min(1.0, group.capacity)) ** here
    choices = group.num_columns
    return 1 - comb(choices - here, group.top_k) / comb(choices, group.top_k)


def group_shares(groups: Sequence[ExpertGroup], token_mix: Mapping[str, int]) -> list[float]:
    """Returns each group's share of all tokens. If the token mix is empty, all modalities count as having equally many
    tokens."""
    mix = token_mix if any(token_mix.values()) else {m: 1 for group in groups for m in group.modalities}
    tokens = [sum(mix.get(modality, 0) for modality in group.modalities) for group in groups]
    return [count / max(1, sum(tokens)) for count in tokens]


def compare(groups: Sequence[ExpertGroup], num_ranks: int, token_mix: Mapping[str, int]) -> PlanComparison:
    """Compares pinned and interleaved placement for the same groups, ranks and token mix. This function chooses the pinned
    ranks, and does not read them from the configuration."""
    plans, missing = [], {}
    for section in (PinnedSection(), InterleavedSection()):
        try:
            placement = make_placement(section, groups, num_ranks=num_ranks, token_mix=token_mix)
        except ConfigError as error:
            missing[section.policy] = "; ".join(error.problems)
        else:
            plans.append(expected_plan(placement, token_mix, name=section.policy))
    return PlanComparison(tuple(plans), missing)


def render(
    comparison: PlanComparison,
    chosen: ExpertPlacement,
    token_mix: Mapping[str, int],
    *,
    policy: str,
    width: int = 120,
    itemsize: int = 2,
) -> str:
    """Returns, as plain text, the chosen placement rank by rank, and the costs of pinned and interleaved placement.

    Args:
        policy: Policy of the chosen placement.
        itemsize: Bytes of an element of a sent row.
    """
    plan = expected_plan(chosen, token_mix, name=f"{policy} (chosen)")
    ranks = Table(title=f"Placement: {policy}, {chosen.num_ranks} ranks an EP group", title_justify="left")
    for column in ("rank", "experts", "work", "rows received a token"):
        ranks.add_column(column, justify="left" if column == "experts" else "right")
    mean = sum(plan.load_R) / len(plan.load_R)
    for rank, (load, remote) in enumerate(zip(plan.load_R, plan.remote_R, strict=True)):
        ranks.add_row(str(rank), experts_text(chosen, rank), f"{load / mean:.0%} of mean", f"{remote:.3f}")
    plans = Table(title="Expected by the data's token mix, uniform router", title_justify="left")
    for column in ("policy", "efficiency (mean / max work)", "remote rows a token", "busiest receiver"):
        plans.add_column(column, justify="left" if column == "policy" else "right")
    others = [other for other in comparison.plans if other.placement.slots != chosen.slots]
    for each in (plan, *others):
        cells = (f"{each.efficiency:.1%}", f"{each.remote_rows_per_token:.3f}", f"{max(each.remote_R):.3f}")
        plans.add_row(each.name, *cells)
    console = Console(width=width, no_color=True, highlight=False, markup=False)
    with console.capture() as text:
        console.print(ranks, plans)
        console.print(comparison.verdict(itemsize=itemsize))
    return text.get()


def experts_text(placement: ExpertPlacement, rank: int) -> str:
    """Returns the experts of a rank as ranges: 'text/0-3 image/2'."""
    parts = []
    for group in placement.groups:
        local = [expert - group.first_expert for expert in placement.local_experts(rank, group)]
        # In a run of consecutive experts, the expert's number minus its place in the list is constant.
        runs = [[index for _, index in run] for _, run in groupby(enumerate(local), lambda pair: pair[1] - pair[0])]
        spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        parts += [f"{group.name}/{','.join(spans)}"] if spans else []
    return " ".join(parts) or "none"


def _least(plans: Sequence[PlacementPlan], costs: Sequence[float]) -> PlacementPlan | None:
    best, *others = sorted(zip(costs, range(len(plans)), strict=True))
    tie = any(cost <= best[0] * (1 + _SAME) + 1e-12 for cost, _ in others)
    return None if tie or not others else plans[best[1]]


def _gain(what: str, winner: PlacementPlan | None, costs: Sequence[tuple[PlacementPlan, float]], unit: str) -> str:
    if winner is None:
        return f"{what}: both equal"
    best, worst = min(cost for _, cost in costs), max(cost for _, cost in costs)
    return f"{what}: {winner.name} has {1 - best / worst:.1%} {unit}" if worst else f"{what}: both equal"


def _trade(compute: PlacementPlan, traffic: PlacementPlan, itemsize: int) -> str:
    """Returns a sentence that says at which ratio of bandwidth to compute the pinned or the interleaved plan is better.

    Per token, the busiest rank takes 6 D max(load) FLOPs and 2 D itemsize max(remote) bytes in forward, so D cancels.
    """
    flops = 6 * (max(traffic.load_R) - max(compute.load_R))
    data = 2 * itemsize * (max(compute.remote_R) - max(traffic.remote_R))
    if data <= 0:
        return f"{compute.name} wins: its busiest receiver has no more rows than {traffic.name}'s"
    ratio = data / flops * 1000
    return (
        f"{compute.name} wins where a rank's link moves more than {ratio:.3g} GB/s for each TFLOP/s it computes, "
        f"{traffic.name} below that"
    )
