"""What load controllers and the balance loss demand of the rest of a configuration. Imports no torch."""

import difflib
from collections.abc import Iterable, Sequence

from moe_dist.config.model_schema import ActiveExpertsSection, GroupSection, MoESection
from moe_dist.config.schema import Config
from moe_dist.config.section import Violation


def balance_violations(config: Config) -> list[Violation]:
    """Rules of `model.moe.balance` and `loss.balance` that do not hold."""
    moe, key = config.model.moe, "model.moe.balance"
    broken = [
        Violation(("loss.balance.null_weight", "model.moe.groups"), f"loss.balance.null_weight.{name}: {problem}")
        for name in config.loss.balance.null_weight
        if (problem := _unknown_group(name, moe.groups))
    ]
    kinds = [section.kind for section in moe.balance]
    for kind in dict.fromkeys(kinds):
        if kinds.count(kind) > 1:
            problem = (
                f"{key}: {kinds.count(kind)} controllers of kind {kind}; leave one, its target may name several groups"
            )
            broken.append(Violation((key,), problem))
    if moe.balance and not getattr(moe.router, "selection_bias", False):
        problem = (
            f"{key}: controllers move the bias that the router chooses by, and model.moe.router has none; set "
            "model.moe.router.selection_bias=true (kind top_k), or leave out the controllers"
        )
        broken.append(Violation((key, "model.moe.router"), problem))
    for index, section in enumerate(moe.balance):
        if isinstance(section, ActiveExpertsSection):
            broken += _target_violations(section, f"{key}.{index}.target", moe.groups)
    return broken


def active_targets(section: MoESection) -> dict[str, float]:
    """True experts a token that a controller holds each group at, by group."""
    return {
        name: target for each in section.balance if each.kind == "active_experts" for name, target in each.target.items()
    }


def even_active(config: Config) -> dict[str, float]:
    """True experts a token that a run is led to, by group: the controller's target, else where a weighted loss is even,
    k n / (n + m w). Groups of which neither speaks are not named."""
    groups, found = config.model.moe.groups, {}
    for name, weight in config.loss.balance.null_weight.items():
        group = groups[name]
        weighted = group.num_null + (_free(group) if config.loss.balance.kind == "null_split" else 0)
        rest = _free(group) if config.loss.balance.kind == "null_averaged" else 0
        found[name] = group.top_k * group.num_experts / (group.num_experts + weighted * weight + rest)
    return found | active_targets(config.model.moe)


def _free(group: GroupSection) -> int:
    return group.num_identity + group.num_constant


def _target_violations(section: ActiveExpertsSection, key: str, groups: dict[str, GroupSection]) -> list[Violation]:
    broken = []
    for name, target in section.target.items():
        problem = _unknown_group(name, groups) or _unreachable(target, groups[name])
        if problem:
            where = f"{key}.{name}={target:g}" if name in groups else f"{key}.{name}"
            broken.append(Violation((key, f"model.moe.groups.{name}", "model.moe.groups"), f"{where}: {problem}"))
    return broken


def _unreachable(target: float, group: GroupSection) -> str:
    """Why a token cannot take so many true experts on average, and what to do; empty where it can."""
    others = group.num_null + _free(group)
    least, most = max(0, group.top_k - others), min(group.top_k, group.num_experts)
    if not others:
        return (
            f"the group has neither null nor zero-computation experts, so that each token takes top_k={group.top_k} true ones; give it "
            "num_null, or leave it out of the target"
        )
    if target > most:
        return (
            f"a token takes at most {most} true experts (top_k={group.top_k}, num_experts={group.num_experts}); lower the "
            "target, or raise top_k"
        )
    if target < least:
        return (
            f"a token takes at least {least} true experts, since {group.top_k - least} of its top_k={group.top_k} choices "
            "can be others (num_null and zero-computation ones); raise the target or num_null, or lower top_k"
        )
    return ""


def _unknown_group(name: str, groups: Iterable[str]) -> str:
    names: Sequence[str] = list(groups)
    if name in names:
        return ""
    close = difflib.get_close_matches(name, names, 1)
    return f"no such group; there are {', '.join(names)}" + (f"; did you mean {close[0]!r}?" if close else "")
