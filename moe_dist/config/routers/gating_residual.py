from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.routers.base import ROUTER, RouterSection


class GatingResidualRouterSection(RouterSection):
    """Top-k whose logits add a learned map of the logits of the MoE layer before (the gating residual of MoE++)."""

    builds = "moe_dist.moe.routers.gating_residual:GatingResidualRouter"
    needs_previous = True

    kind: Literal["gating_residual"] = "gating_residual"
    normalise: Literal["true_chosen", "all_chosen", "true_all", "none"] = "true_chosen"
    """Columns over which the routing weights are a softmax, as with kind=top_k."""
    scale: PositiveFloat = Field(default=1.0, description="Factor of every routing weight.")
    selection_bias: bool = Field(default=False, description="Choose by softmax + bias, as with kind=top_k.")

    def further_parameters(self, columns: int) -> int:
        return columns**2

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        yield from super().violations_in(config)
        if config.model.mixture_of_depths is not None:
            problem = (
                f"model.mixture_of_depths: {self.name} adds the logits of the layer before, which a token that skips that "
                f"layer does not have; set model.mixture_of_depths to null, or {ROUTER}.kind=top_k"
            )
            yield Violation(("model.mixture_of_depths", f"{ROUTER}.kind"), problem)
        if not config.engine.passes_logits:
            problem = (
                f"engine.kind={config.engine.kind}: it passes no logits to the next layer, as {self.name} needs; set "
                f"engine.kind=moe_dist, or {ROUTER}.kind=top_k"
            )
            yield Violation(("engine.kind", f"{ROUTER}.kind"), problem)
