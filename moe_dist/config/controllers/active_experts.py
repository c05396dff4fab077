from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.controllers.base import ControllerSection
from moe_dist.config.section import GroupName, Violation, WholeConfig, unknown_name


class ActiveExpertsSection(ControllerSection):
    """Hold the mean number of true experts a token takes at a target, by the bias (LongCat-Flash)."""

    kind: Literal["active_experts"] = "active_experts"
    target: dict[GroupName, PositiveFloat] = Field(min_length=1)
    """True experts a token, by group; groups that are not named are left alone."""
    rate: PositiveFloat
    """Of the first step: a bias moves by rate x (target - load) / (k x n), a part of a probability."""
    decay_steps: PositiveInt | None = None
    """Steps after which the rate is half, as rate / (1 + step / decay_steps); null keeps it."""
    per: Literal["group", "expert"] = "group"
    """The true experts of a group move together, or each by its own load, which evens them out as well."""

    @property
    def targets(self) -> Mapping[str, float]:
        return self.target

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        groups = config.model.moe.groups
        key = f"model.moe.balance.{config.model.moe.balance.index(self)}.target"
        for name, target in self.target.items():
            if problem := unknown_name("group", name, groups) or _unreachable(target, groups[name]):
                where = f"{key}.{name}={target:g}" if name in groups else f"{key}.{name}"
                yield Violation((key, f"model.moe.groups.{name}", "model.moe.groups"), f"{where}: {problem}")


def _unreachable(target: float, group: Any) -> str:
    """Why the mean number of true experts per token cannot reach the target, with a fix; empty if it can."""
    others = group.num_null + group.num_zero_computation
    least, most = max(0, group.top_k - others), min(group.top_k, group.num_experts)
    if not others:
        return (
            "the group has neither null nor zero-computation experts, so that each token takes "
            f"top_k={group.top_k} true ones; give it num_null, or leave it out of the target"
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
