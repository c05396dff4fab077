from typing import Literal

from moe_dist.config.base.section import PositiveInt
from moe_dist.config.routers.base import ROUTER
from moe_dist.config.routers.expert_choice import ExpertChoiceRouterSection


class ExpertThresholdRouterSection(ExpertChoiceRouterSection):
    """Each expert takes the tokens whose score exceeds its running threshold, also in training (Expert Threshold)."""

    builds = "moe_dist.moe.routers.expert_threshold:ExpertThresholdRouter"
    served = "expert_threshold"

    # Narrowing the type is sound, because fields are frozen.
    kind: Literal["expert_threshold"] = "expert_threshold"  # pyright: ignore[reportIncompatibleVariableOverride]
    causal: Literal["threshold"] = "threshold"  # pyright: ignore[reportIncompatibleVariableOverride]
    """Evaluation routes by the same thresholds as training, after a calibration (evaluation.calibration)."""
    warmup_steps: PositiveInt = 100
    """Number of first steps, in which experts choose tokens as in expert choice. A shorter run uses expert choice to its
    end."""

    def counts_unknown(self) -> str:
        return f"with {self.name} they depend on the thresholds; set {ROUTER}.kind=expert_choice with {ROUTER}.scope=rank"
