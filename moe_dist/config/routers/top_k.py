from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Share, Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, AdaptiveRouterSection, RouterSection


class TopKRouterSection(RouterSection):
    """Each token takes the top_k best experts of one softmax over true, null and zero-computation experts (AdaMoE)."""

    builds = "moe_dist.moe.routers.top_k:TopKRouter"
    served = "top_k"
    hosted = "moe_dist.hf.host.choices:family_router"
    softmax_top_k = True
    adapted = True

    kind: Literal["top_k"] = "top_k"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Columns over which the routing weights are a softmax. true_chosen: the chosen columns without null experts (AdaMoE).
    all_chosen: all chosen columns. true_all: all columns without null experts. none: all columns of the group."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
    null_logit: Literal["each", "single"] = "each"
    """each: every null expert has a separate router row. single: a group's null experts share one row and its logit."""
    selection_bias: bool = False
    """Choose by softmax + bias. The bias starts at 0 and does not change the weights (LongCat-Flash, Ernie 4.5)."""
    logit_bias: bool = Field(default=False, description="Add a learned bias to each logit (gpt-oss). No null experts then.")

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        for name, group in config.model.moe.groups.items() if self.logit_bias else ():
            if group.num_null or group.num_zero_computation:
                problem = (
                    f"{ROUTER}.logit_bias=true: null, identity and constant experts have no such bias; set their numbers "
                    f"in model.moe.groups.{name} to 0, or logit_bias=false"
                )
                yield Violation((f"{ROUTER}.logit_bias", f"model.moe.groups.{name}"), problem)

    def equal_share(self, group: Any) -> int | None:
        true, null = group.num_experts, group.num_null
        return {"true_chosen": true, "all_chosen": group.top_k, "true_all": true, "none": true + null}[self.normalise]

    def growth_of_scale(self, parts: int) -> int | None:
        return parts


class TopPRouterSection(AdaptiveRouterSection):
    """Each token takes its most probable experts until their probabilities add up to p, but at most top_k (DTop-p)."""

    builds = "moe_dist.moe.routers.top_p:TopPRouter"
    served = "top_p"
    hosted = "moe_dist.hf.host.choices:FamilyTopP"
    least_columns = 1

    kind: Literal["top_p"] = "top_p"
    p: Share = 0.4
    """Sum of probabilities at which a token takes no further columns. model.moe.balance changes it per layer and group."""
    normalise: Literal["true_chosen", "none"] = "none"
    """Routing weights. none: the probabilities. true_chosen: the probabilities of the taken columns without null experts,
    divided by their sum."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
