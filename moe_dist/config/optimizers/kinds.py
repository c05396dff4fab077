from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import Decay, Violation, WholeConfig, unmet
from moe_dist.config.optimizers.base import OptimizerSection


class AdamWSection(OptimizerSection):
    """AdamW for all parameters."""

    builds = "moe_dist.optim.optimizer:adamw"

    kind: Literal["adamw"] = "adamw"
    backend: Literal["auto", "torch", "apex"] = "auto"
    """torch: torch's fused AdamW. apex: NVIDIA Apex's FusedAdam. auto: apex if it is installed, else torch."""

    @property
    def needs_apex(self) -> bool:
        return self.backend == "apex"


class MuonSection(OptimizerSection):
    """Use Muon for matrices of attention, FFNs and experts, and AdamW for embedding, output, norms, routers and vectors."""

    builds = "moe_dist.optim.muon:muon"
    orthogonal = True

    kind: Literal["muon"] = "muon"
    momentum: Decay = Field(default=0.95, description="Decay rate of the running mean of a matrix's gradients (Nesterov).")

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        needs = (("train.only", (None,), "only part of a model is trained, without the matrices that Muon is for"),)
        yield from unmet(config, "optimizer.kind", "optimizer.kind=muon", needs, instead="set optimizer.kind=adamw")
