from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt, Share, Violation, WholeConfig
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


class TopPRouterSection(AdaptiveRouterSection):
    """Each token takes its most probable experts until their probabilities add up to p, but at most top_k (DTop-p)."""

    builds = "moe_dist.moe.routers.adaptive:TopPRouter"
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


class GatingResidualRouterSection(RouterSection):
    """Top-k with the gating residual of MoE++: a learned map of the previous MoE layer's logits is added to the logits."""

    builds = "moe_dist.moe.routers.gating_residual:GatingResidualRouter"
    needs_previous = True
    needs = (
        ("model.mixture_of_depths", (None,), "a token that skips a layer has no logits there to add"),
        ("engine.passes_logits", (True,), "logits must pass to the next layer"),
    )

    kind: Literal["gating_residual"] = "gating_residual"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Columns over which the routing weights are a softmax, as with kind=top_k."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
    selection_bias: bool = Field(default=False, description="Choose by softmax + bias, as with kind=top_k.")

    def further_parameters(self, columns: int) -> int:
        return columns**2


class GroupLimitedRouterSection(RouterSection):
    """Each token takes the top_k experts by sigmoid + bias, from only a few node groups (DeepSeek-V3, GLM-4.5, Kimi K2)."""

    builds = "moe_dist.moe.routers.group_limited:GroupLimitedRouter"
    served = "group_limited"
    adapted = True

    kind: Literal["group_limited"] = "group_limited"
    n_group: PositiveInt = 1
    """Number of node groups into which each group's true experts are divided, in order. Null and zero-computation experts
    belong to no node group."""
    topk_group: PositiveInt = 1
    """Number of node groups from which a token takes experts. These are the node groups whose two best scores have the
    largest sums."""
    normalise: Literal["true_chosen", "none"] = "true_chosen"
    """Routing weights. true_chosen: the sigmoids of the chosen true experts, divided by their sum. none: the sigmoids."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight (routed_scaling_factor).")
    selection_bias: bool = True
    """Choose by sigmoid + bias instead of the sigmoid. The bias starts at 0, and model.moe.balance changes it. It does not
    change the weights."""

    @property
    def node_limit(self) -> tuple[int, int]:
        return (self.n_group, self.topk_group)

    def equal_score(self, group: Any) -> float:
        return 0.5

    def equal_share(self, group: Any) -> int | None:
        if self.topk_group < self.n_group:
            return None
        return group.num_experts if self.normalise == "true_chosen" else 2  # the sigmoid of 0 is 1 / 2

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        if self.topk_group > self.n_group:
            problem = (
                f"{ROUTER}.topk_group={self.topk_group}: there are {ROUTER}.n_group={self.n_group} node groups; lower it, "
                "or raise n_group"
            )
            yield Violation((f"{ROUTER}.topk_group", f"{ROUTER}.n_group"), problem)
            return
        for name, group in config.model.moe.groups.items():
            key, size = f"model.moe.groups.{name}", group.num_experts // self.n_group
            if group.num_experts % self.n_group or (self.n_group > 1 and size < 2):
                problem = (
                    f"{ROUTER}.n_group={self.n_group}: {key}.num_experts={group.num_experts} must divide into node groups "
                    f"of equal size with at least 2 experts; take a divisor of it up to {max(1, group.num_experts // 2)}, "
                    "or another num_experts"
                )
                yield Violation((f"{ROUTER}.n_group", f"{key}.num_experts"), problem)
                continue
            open_columns = self.topk_group * size + group.num_null + group.num_zero_computation
            if group.top_k > open_columns:
                problem = (
                    f"{key}.top_k={group.top_k}: with {ROUTER}.topk_group={self.topk_group} of {self.n_group} node groups "
                    f"a token has {open_columns} columns to take; lower top_k, or raise topk_group"
                )
                yield Violation((f"{key}.top_k", f"{ROUTER}.topk_group", f"{ROUTER}.n_group"), problem)
