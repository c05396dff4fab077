from typing import Literal

from moe_dist.config.optimizers.base import OptimizerSection


class AdamWSection(OptimizerSection):
    """AdamW for all parameters."""

    kind: Literal["adamw"] = "adamw"
    backend: Literal["auto", "torch", "apex"] = "auto"
    """torch is torch's fused AdamW. apex is NVIDIA Apex's FusedAdam. auto takes apex if it is installed, else torch."""

    @property
    def needs_apex(self) -> bool:
        return self.backend == "apex"
