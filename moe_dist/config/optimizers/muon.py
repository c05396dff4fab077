from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from moe_dist.config.base.section import Decay, Violation, WholeConfig
from moe_dist.config.optimizers.base import OptimizerSection


class MuonSection(OptimizerSection):
    """Muon for the matrices of attention, FFNs and experts. AdamW for embedding, output, norms, routers and vectors."""

    builds = "moe_dist.optim.muon:muon"
    orthogonal = True

    kind: Literal["muon"] = "muon"
    momentum: Decay = Field(default=0.95, description="Decay rate of the running mean of a matrix's gradients (Nesterov).")

    @property
    def decays(self) -> tuple[float, ...]:
        return (*self.betas, self.momentum)

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if config.train.only is not None:
            problem = (
                f"optimizer.kind=muon: train.only={config.train.only} trains none of the matrices that Muon is for; set "
                "optimizer.kind=adamw, or train.only to null"
            )
            yield Violation(("optimizer.kind", "train.only"), problem)
