from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import GroupName, NonNegative, Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, DrawnRouterSection

KEY = f"{ROUTER}.active_experts"


class ScheduledTopKRouterSection(DrawnRouterSection):
    """Top-k with a given mean k for each layer, which does not depend on the token: a baseline for null experts."""

    builds = "moe_dist.moe.routers.scheduled_top_k:ScheduledTopKRouter"

    kind: Literal["scheduled_top_k"] = "scheduled_top_k"
    active_experts: dict[GroupName, tuple[NonNegative, ...]] = Field(min_length=1)
    """Mean number of true experts per token, by group and MoE layer; at most the group's top_k. With 1.5 every token takes
    its best expert, and a random half of the tokens also takes the second best."""

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        model = config.model
        layers, groups = len(model.moe_layers), model.moe.groups
        if set(self.active_experts) != set(groups):
            problem = (
                f"{KEY} names {', '.join(self.active_experts)}; model.moe.groups are {', '.join(groups)}: name each group"
            )
            yield Violation((KEY, "model.moe.groups"), problem)
        for name, loads in self.active_experts.items():
            key = f"{KEY}.{name}"
            if len(loads) != layers:
                problem = f"{key} has {len(loads)} numbers for {layers} MoE layers: give one number for each layer"
                yield Violation((key, "model.num_layers"), problem)
            if name in groups and max(loads, default=0.0) > groups[name].top_k:
                top_k = f"model.moe.groups.{name}.top_k"
                problem = f"{key} has {max(loads):g}, above {top_k}={groups[name].top_k}: lower it, or raise top_k"
                yield Violation((key, top_k), problem)
            # The random draw needs each token's number in the step, which a mixture-of-depths layer does not pass on.
            drawn = [each for each, load in zip(model.moe_layers, loads, strict=False) if load % 1.0]
            if deep := sorted(set(drawn) & set(model.depth_layers)):
                problem = (
                    f"{key}={list(loads)} with model.mixture_of_depths: a draw per token is impossible in the layers "
                    f"{deep}, which compute some of the tokens; give whole numbers there, or set model.mixture_of_depths "
                    "to null"
                )
                yield Violation((key, "model.mixture_of_depths"), problem)
