from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import (
    Count,
    GroupName,
    NonNegative,
    PositiveInt,
    Violation,
    WholeConfig,
    unknown_name,
    unordered,
)
from moe_dist.config.controllers.base import ControllerSection


class ActiveExpertsSection(ControllerSection):
    """Change the selection bias so that the mean number of true experts per token stays at a target (LongCat-Flash)."""

    builds = "moe_dist.moe.balance.rules:ActiveExperts"

    kind: Literal["active_experts"] = "active_experts"
    target: dict[GroupName, PositiveFloat] = Field(min_length=1)
    """Target number of true experts per token, by group. The controller does not change groups that are not named."""
    rate: PositiveFloat
    """Rate of the first step. A bias changes by rate x (target - load) / (k x n); load is the mean number of true experts
    per token."""
    decay_steps: PositiveInt | None = None
    """Number of steps after which the rate has halved: it is rate / (1 + step / decay_steps). null: the rate is
    constant."""
    ramp_steps: Count = 0
    """Number of steps in which the target moves linearly to `target` from the largest possible number of true experts per
    token. A trained model thus gives up true experts slowly."""
    schedule: tuple[tuple[Count, PositiveFloat], ...] = ((0, 1.0),)
    """Pairs (first step, factor of the targets). [[0, 2.0], [1000, 1.0]] doubles the targets in the first 1,000 steps."""
    proportional: NonNegative = 0.0
    """Factor of the last error (target - load) in a bias, where `rate` is the factor of the sum of all errors. If the
    factor is above 0, the controller is proportional-integral (DTop-p)."""
    per: Literal["group", "expert"] = "group"
    """group changes the biases of all true experts of a group by the same amount. expert changes each bias according to its
    expert's load, which also balances the experts."""

    @property
    def targets(self) -> Mapping[str, float]:
        return self.target

    def violations(self) -> Iterator[Violation]:
        yield from unordered(self.schedule)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        groups, router = config.model.moe.groups, config.model.moe.router
        key = f"model.moe.balance.{config.model.moe.balance.index(self)}.target"
        for name, target in self.target.items():
            for factor in dict.fromkeys(factor for _, factor in self.schedule):
                if problem := unknown_name("group", name, groups) or _unreachable(factor * target, groups[name], router):
                    where = f"{key}.{name}={target:g}" if name in groups else f"{key}.{name}"
                    where += "" if factor == 1.0 else f" times {factor:g} of the schedule"
                    yield Violation((key, f"model.moe.groups.{name}", "model.moe.groups"), f"{where}: {problem}")
                    break


def _unreachable(target: float, group: Any, router: Any) -> str:
    """Returns the reason why the mean number of true experts per token cannot reach the target, and a fix; an empty text if
    it can."""
    others = group.num_null + group.num_zero_computation
    least, most = router.active_range(group)
    if least == most == group.top_k and not others:
        return (
            "the group has neither null nor zero-computation experts, so that each token takes "
            f"top_k={group.top_k} true experts; set num_null, or remove the group from the target"
        )
    if target > most:
        return (
            f"a token takes at most {most} true experts (top_k={group.top_k}, num_experts={group.num_experts}); lower the "
            "target, or raise top_k"
        )
    if target < least and not others:
        return f"with {router.name} a token takes at least {least} true expert; raise the target, or set num_null"
    if target < least:
        return (
            f"a token takes at least {least} true experts, because at most {others} of its top_k={group.top_k} choices can "
            "be null or zero-computation experts; raise the target or num_null, or lower top_k"
        )
    return ""


class LossFreeSection(ControllerSection):
    """After each step, raise the selection bias of experts whose load is below their group's mean load, and lower all other
    biases (DeepSeek-V3)."""

    builds = "moe_dist.moe.balance.rules:LossFree"

    kind: Literal["loss_free"] = "loss_free"
    rate: PositiveFloat = Field(default=1e-3, description="Amount by which a step raises or lowers a bias.")
