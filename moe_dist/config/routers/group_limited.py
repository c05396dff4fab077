from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import PositiveInt, Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, RouterSection


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

    def growth_of_scale(self, parts: int) -> int | None:
        if self.topk_group < self.n_group:
            return None
        return parts if self.normalise == "true_chosen" else 1

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
