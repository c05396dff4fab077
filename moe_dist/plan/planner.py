"""Estimates the costs of pinned placement (each expert group has separate ranks) and interleaved placement (all ranks have
experts of every group) for the token mix of the training data (the number of tokens of each modality).

All figures are expected values under uniform routing: the k choices of a token are a random subset of its expert group's n
+ m router columns (n for true experts, m for others). Every rank has the same token mix. Shape letters: R ranks of an EP
group, D hidden size, F width of an expert."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

from rich.console import Console
from rich.table import Table

from moe_dist.config.base.section import named
from moe_dist.config.parallel.section import InterleavedSection, PinnedSection
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.memory import RankMemory
from moe_dist.plan.policies import make_placement
from moe_dist.plan.rows import Expected, Wire

_SAME = 1e-9  # relative difference below which two plans count as equal


@dataclass(frozen=True)
class PlacementCosts:
    """A placement and its expected costs per token."""

    name: str  # name of the placement policy
    placement: ExpertPlacement
    load_R: tuple[float, ...]  # sum of ffn_dim over each rank's (token, expert) pairs; forward FLOPs are 6 D times the sum
    remote_R: tuple[float, ...]  # number of rows from other ranks that each rank receives, one row per (token, rank)

    @property
    def efficiency(self) -> float:
        """Returns (mean load of the ranks) / (largest load), an upper bound of throughput relative to equal loads."""
        return sum(self.load_R) / len(self.load_R) / max(self.load_R)

    @property
    def remote_rows_per_token(self) -> float:
        """Returns the number of rows per token that ranks send to other ranks. A row has D x itemsize bytes, and is sent
        four times: in dispatch, in combine, and in the backward of both."""
        return sum(self.remote_R)


@dataclass(frozen=True)
class PlanComparison:
    """The costs of pinned and interleaved placement of the same groups."""

    plans: tuple[PlacementCosts, ...]  # one plan for each of the two policies that is possible
    missing: Mapping[str, str]  # maps each impossible policy to the reason


def expected_plan(placement: ExpertPlacement, token_mix: Mapping[str, int], *, name: str) -> PlacementCosts:
    """Returns the expected load and traffic of a placement.

    A token with k of n + m choices takes at least one of a rank's e experts with probability 1 - C(n + m - e, k) / C(n + m,
    k), or 1 - (1 - c)^e if each expert takes a fraction c of the tokens. With probability (R - 1) / R the token comes from
    another rank.
    """
    ranks = placement.num_ranks
    expected = Expected(token_mix).load(placement, Wire(ranks), tokens=1, layers=1)
    load_R, rows_R = expected.work[0, 0] / ranks, expected.rows[0, 0] / ranks
    return PlacementCosts(name, placement, tuple(load_R.tolist()), tuple((rows_R * (ranks - 1) / ranks).tolist()))


def compare(groups: Sequence[ExpertGroup], num_ranks: int, token_mix: Mapping[str, int]) -> PlanComparison:
    """Compares pinned and interleaved placement for given groups, ranks and token mix. The pinned ranks are chosen here,
    not read from the configuration."""
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
    `itemsize` is the number of bytes of an element in a sent row."""
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
        own = replace(plan, name=policy)
        console.print(verdict(own, others, comparison.missing, itemsize=itemsize))
    return text.get()


def verdict(
    chosen: PlacementCosts, others: Sequence[PlacementCosts], missing: Mapping[str, str], *, itemsize: int = 2
) -> str:
    """Returns sentences that compare the rows and work of the chosen placement with those of each other placement.

    Args:
        others: Plans of other placements. A plan with the same name as the chosen plan gives the groups different ranks.
        missing: Maps each impossible policy to the reason.
        itemsize: Number of bytes of an element in a sent row.
    """
    uses, found = f"This run uses {chosen.name} placement", list[str]()
    for other in others:
        name = f"{other.name} with ranks for this mix" if other.name == chosen.name else other.name
        rows = _more_or_less(chosen.remote_rows_per_token, other.remote_rows_per_token, "fewer", "rows")
        work = _more_or_less(max(chosen.load_R), max(other.load_R), "less", "work")
        trade = _trade(chosen, other, name, itemsize)
        begin = "It" if found else f"{uses}, which"
        found.append(f"{begin} sends {rows} than {name}; its busiest rank has {work}{trade}.")
    impossible = [f"{name.capitalize()} is not possible: {why}." for name, why in missing.items()]
    return " ".join([*(found or [f"{uses}."]), *impossible])


def experts_text(placement: ExpertPlacement, rank: int) -> str:
    """Returns the experts on a rank as ranges, such as 'text/0-3 image/2'."""
    parts = []
    for group in placement.groups:
        local = [expert - group.first_expert for expert in placement.local_experts(rank, group)]
        # In a run of consecutive experts, the expert's index minus its position in the list is constant.
        runs = [[index for _, index in run] for _, run in groupby(enumerate(local), lambda pair: pair[1] - pair[0])]
        spans = [f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs]
        parts += [f"{group.name}/{','.join(spans)}"] if spans else []
    return " ".join(parts) or "none"


def _more_or_less(own: float, other: float, less: str, unit: str) -> str:
    """Returns a phrase that says by how much `own` differs from `other`, such as `9.5% fewer rows`."""
    if abs(own - other) <= _SAME * max(own, other) + 1e-12:
        return f"no more {unit}"
    return f"more {unit}" if not other else f"{abs(own / other - 1):.1%} {'more' if own > other else less} {unit}"


def _trade(chosen: PlacementCosts, other: PlacementCosts, name: str, itemsize: int) -> str:
    """Returns the condition under which the chosen placement is faster. The phrase is empty unless one of the two plans has
    less work but more rows.

    Per token, the busiest rank computes 6 D max(load) FLOPs and moves 2 D itemsize max(remote) bytes in forward. D cancels.
    """
    flops = 6 * (max(chosen.load_R) - max(other.load_R))
    data = 2 * itemsize * (max(other.remote_R) - max(chosen.remote_R))
    if abs(flops) <= 1e-12 or abs(data) <= 1e-12 or (flops > 0) != (data > 0):
        return ""
    bound = f"than {data / flops * 1000:.3g} GB/s for each TFLOP/s it computes"
    return f"; it is faster than {name} where a rank's link moves {'less' if flops > 0 else 'more'} {bound}"


def fullest_rank(
    config: Config, placement: ExpertPlacement, token_mix: Mapping[str, int]
) -> tuple[int, RankMemory, PlacementCosts]:
    """Returns the position in an EP group that needs the most memory, its memory, and the costs of `placement`."""
    ranks, estimate = placement.num_ranks, named(config.engine.memory)
    load = Expected(token_mix).load(placement, Wire(ranks), tokens=1, layers=1)
    memories: list[RankMemory] = []
    for rank, (rows, pairs) in enumerate(zip(load.rows[0, 0].tolist(), load.pairs[0, 0].tolist(), strict=True)):
        rows = rows if ranks > 1 else min(1.0, pairs)
        memories.append(estimate(config, placement, rank=rank, rows=rows, pairs=pairs))
    rank = max(range(ranks), key=lambda r: memories[r].total)
    return rank, memories[rank], expected_plan(placement, token_mix, name=config.placement.policy)
