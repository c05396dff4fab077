from collections.abc import Iterator
from typing import Literal

from moe_dist.config.base.section import Violation
from moe_dist.config.optimizers.base import OptimizerSection


class AdamWSection(OptimizerSection):
    """AdamW for all parameters."""

    builds = "moe_dist.optim.optimizer:adamw"

    kind: Literal["adamw"] = "adamw"
    backend: Literal["auto", "torch", "apex"] = "auto"
    """torch: torch's fused AdamW. apex: NVIDIA Apex's FusedAdam. auto: apex if it is installed, else torch."""

    def violations(self) -> Iterator[Violation]:
        yield from super().violations()
        if self.backend == "apex" and self.moments == "bf16":
            problem = "backend=apex, moments=bf16: Apex keeps its moments in fp32; set backend=torch, or moments=fp32"
            yield Violation(("backend", "moments"), problem)

    @property
    def needs_apex(self) -> bool:
        return self.backend == "apex"
