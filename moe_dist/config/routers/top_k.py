from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.routers.base import RouterSection


class TopKRouterSection(RouterSection):
    """Each token takes its top_k columns of one softmax over true, null and zero-computation experts (AdaMoE)."""

    softmax_top_k: ClassVar[bool] = True

    kind: Literal["top_k"] = "top_k"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Columns over which the routing weights are a softmax. true_chosen: the chosen columns without null experts (AdaMoE).
    all_chosen: all chosen columns. true_all: all columns without null experts. none: all columns of the group."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
    null_logit: Literal["each", "single"] = "each"
    """each gives every null expert its own router row. single gives all null experts of a group the logit of one row."""
    selection_bias: bool = False
    """Choose by softmax + bias. The bias starts at 0 and does not change the weights (LongCat-Flash, Ernie 4.5)."""

    def equal_share(self, group: Any) -> int | None:
        true, null = group.num_experts, group.num_null
        return {"true_chosen": true, "all_chosen": group.top_k, "true_all": true, "none": true + null}[self.normalise]

    def growth_of_scale(self, parts: int) -> int | None:
        return parts
