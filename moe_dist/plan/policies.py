"""Makes the placement of experts from a configuration's section `placement`. A rank is a position in an EP group."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_dist.config.base.section import did_you_mean, unknown_name
from moe_dist.config.model_schema import MoESection
from moe_dist.config.parallel.section import ExplicitSection, PinnedSection, PlacementSection
from moe_dist.errors import ConfigError
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement, even_runs

Slots = list[list[int]]
Groups = Sequence[ExpertGroup]
Mix = Mapping[str, int]


def expert_groups(moe: MoESection) -> tuple[ExpertGroup, ...]:
    """Returns the expert groups of a configuration. Each group has the logical ids of its experts."""
    groups: list[ExpertGroup] = []
    first, (node_groups, topk_node_groups) = 0, moe.router.node_limit
    for name, section in moe.groups.items():
        groups.append(
            ExpertGroup(
                name=name,
                num_experts=section.num_experts,
                num_null=section.num_null,
                top_k=section.top_k,
                ffn_dim=section.ffn_dim,
                first_expert=first,
                modalities=section.modalities or (name,),
                num_identity=section.num_identity,
                num_constant=section.num_constant,
                token_share=moe.router.token_share(name, section, moe.active_targets.get(name)),
                node_groups=node_groups,
                topk_node_groups=topk_node_groups,
            )
        )
        first += section.num_experts
    return tuple(groups)


def make_placement(section: PlacementSection, groups: Groups, *, num_ranks: int, token_mix: Mix) -> ExpertPlacement:
    """Places every expert with the section's policy. Raises one ConfigError with all faults of the section. The number of
    tokens of each modality (`token_mix`) decides how many ranks a pinned group gets; an empty mix means equal numbers."""
    return POLICIES[section.policy](section, groups, num_ranks, token_mix)


POLICIES: dict[str, Callable[[Any, Groups, int, Mix], ExpertPlacement]] = {
    "interleaved": lambda _, groups, num_ranks, _mix: ExpertPlacement.interleaved(groups, num_ranks),
    "pinned": lambda section, groups, num_ranks, mix: _pinned(section, groups, num_ranks, mix),
    "explicit": lambda section, groups, num_ranks, _mix: _placed(groups, _explicit_slots(section, groups, num_ranks)),
}


def _placed(groups: Groups, slots: Slots) -> ExpertPlacement:
    return ExpertPlacement(tuple(groups), tuple(tuple(sorted(rank)) for rank in slots))


def replicated_placement(groups: Groups) -> ExpertPlacement:
    """Returns the placement with all experts on one rank: for a whole model, or for LoRA experts, which every rank has."""
    return ExpertPlacement(tuple(groups), (tuple(expert for group in groups for expert in group.experts),))


def group_load(group: ExpertGroup, token_mix: Mix) -> float:
    """Returns the work of an expert group: number of tokens x expected number of true experts per token x `ffn_dim`.
    `token_mix` gives the number of tokens of each modality. If the mix has no tokens, the group has 1 token."""
    tokens = sum(token_mix.get(modality, 0) for modality in group.modalities) if any(token_mix.values()) else 1
    return tokens * group.expected_experts_per_token * group.ffn_dim


def pinned_ranks(
    section: PinnedSection, groups: Groups, *, num_ranks: int, token_mix: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Returns the ranks of each group: the ranks that the section names, otherwise some of the remaining ranks. Raises one
    ConfigError with all faults."""
    given = {name: pinned.ranks for name, pinned in section.groups.items() if pinned.ranks}
    problems = _pinned_problems(section, given, groups, num_ranks)
    if problems:
        raise ConfigError(problems)
    taken = {rank for ranks in given.values() for rank in ranks}
    free = [rank for rank in range(num_ranks) if rank not in taken]
    open_groups = [group for group in groups if group.name not in given]
    shares = _shares(open_groups, len(free), token_mix)
    ranks: dict[str, tuple[int, ...]] = dict(given)
    for group, share in zip(open_groups, shares, strict=True):
        ranks[group.name], free = tuple(free[:share]), free[share:]
    return ranks


def _pinned_problems(
    section: PinnedSection, given: Mapping[str, tuple[int, ...]], groups: Groups, num_ranks: int
) -> list[str]:
    names = [group.name for group in groups]
    problems = [
        f"placement.groups.{name}: {problem}" for name in section.groups if (problem := unknown_name("group", name, names))
    ]
    owner: dict[int, str] = {}
    for name, ranks in given.items():
        key = f"placement.groups.{name}.ranks={list(ranks)}"
        if outside := sorted({rank for rank in ranks if rank >= num_ranks}):
            problems.append(f"{key}: {outside} out of range; take ranks below parallel.ep={num_ranks}, or raise it")
        if len(set(ranks)) != len(ranks):
            problems.append(f"{key}: a rank is listed twice; name each rank once")
        if shared := sorted({rank for rank in ranks if owner.get(rank, name) != name}):
            problems.append(
                f"{key}: {shared} already hold group {owner[shared[0]]!r}; pinned groups must not share ranks; give other "
                "ranks, or set placement.policy=explicit or interleaved"
            )
        owner.update(dict.fromkeys(ranks, name))
    without = [name for name in names if name not in given]
    free = num_ranks - len([rank for rank in owner if rank < num_ranks])
    if len(without) > free:
        problems.append(
            f"placement.policy=pinned: {free} of parallel.ep={num_ranks} ranks are free for {len(without)} groups "
            f"({', '.join(without)}), and each group needs a rank; raise parallel.ep, or set placement.policy=interleaved"
        )
    return problems


def _shares(groups: Groups, num_ranks: int, token_mix: Mix) -> list[int]:
    """Returns the number of ranks of each group. Each group first gets one rank. Then, repeatedly, the group with the
    busiest rank gets one more.

    This rule minimises the work of the busiest of all ranks. If every group has as many ranks as experts, any further ranks
    get no experts.
    """
    loads = [group_load(group, token_mix) for group in groups]
    shares = [1] * len(groups)
    for _ in range(num_ranks - len(groups)):
        able = [i for i, group in enumerate(groups) if shares[i] < group.num_experts]
        if not able:
            break
        busiest = max(able, key=lambda i: (_busiest(groups[i], loads[i], shares[i]), loads[i] / shares[i]))
        shares[busiest] += 1
    return shares


def _busiest(group: ExpertGroup, load: float, num_ranks: int) -> float:
    return load * -(-group.num_experts // num_ranks) / group.num_experts


def _pinned(section: PinnedSection, groups: Groups, num_ranks: int, token_mix: Mix) -> ExpertPlacement:
    ranks = pinned_ranks(section, groups, num_ranks=num_ranks, token_mix=token_mix)
    slots: Slots = [[] for _ in range(num_ranks)]
    for group in groups:
        for rank, experts in zip(ranks[group.name], even_runs(group.experts, len(ranks[group.name])), strict=True):
            slots[rank].extend(experts)
    return _placed(groups, slots)


def _explicit_slots(section: ExplicitSection, groups: Groups, num_ranks: int) -> Slots:
    problems: list[str] = []
    if len(section.slots) != num_ranks:
        problems.append(
            f"placement.slots: lists {len(section.slots)} ranks, parallel.ep={num_ranks}; give one list per rank, [] for "
            "none"
        )
    by_name = {group.name: group for group in groups}
    places: dict[int, list[int]] = {}
    for rank, names in enumerate(section.slots):
        for name in names:
            expert = _expert_id(name, by_name)
            if isinstance(expert, str):
                problems.append(f"placement.slots.{rank}: {expert}")
            else:
                places.setdefault(expert, []).append(rank)
    labels = {expert: f"{g.name}/{i}" for g in groups for i, expert in enumerate(g.experts)}
    if missing := [label for expert, label in labels.items() if expert not in places]:
        problems.append(f"placement.slots: no rank has {', '.join(missing)}; give each expert one slot")
    for expert, ranks in places.items():
        if len(ranks) > 1:
            problems.append(f"placement.slots: {labels[expert]} is on ranks {ranks}; give it one slot")
    if problems:
        raise ConfigError(problems)
    slots: Slots = [[] for _ in range(num_ranks)]
    for expert, (rank, *_) in places.items():
        slots[rank].append(expert)
    return slots


def _expert_id(name: str, groups: Mapping[str, ExpertGroup]) -> int | str:
    """Returns the logical id of the expert with the name 'group/index', or an error text."""
    group_name, _, index = name.rpartition("/")
    group = groups.get(group_name)
    if group is None:
        near = did_you_mean(group_name or name, groups) or f"; the groups are {', '.join(groups)}"
        return f"{name!r}: write 'group/index'{near}"
    if not index.isdecimal() or int(index) >= group.num_experts:
        return f"{name!r}: group {group_name!r} has the experts 0 to {group.num_experts - 1}"
    return group.first_expert + int(index)
