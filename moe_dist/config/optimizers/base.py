from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Count, Decay, Fraction, KindSection, NonNegative, PositiveInt, Section, Violation


class ConstantSchedule(Section):
    """Linear warm-up, then a constant learning rate."""

    kind: Literal["constant"] = "constant"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")


class CosineSchedule(Section):
    """Linear warm-up, then half a period of a cosine down to min_ratio x lr at the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    min_ratio: Fraction = Field(default=0.1, description="Learning rate of the last step, divided by lr.")


class WsdSchedule(Section):
    """Warm-up, stable, decay (WSD). The learning rate rises linearly, stays constant, then falls linearly to min_ratio x lr
    in the last decay_steps."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: Count = Field(default=0, description="Steps of linear warm-up from 0.")
    decay_steps: PositiveInt = Field(description="Steps of the final decay.")
    min_ratio: Fraction = Field(default=0.0, description="Learning rate of the last step, divided by lr.")


ScheduleSection = Annotated[ConstantSchedule | CosineSchedule | WsdSchedule, Field(discriminator="kind")]

# Largest beta for moments in bf16. A step with a zero gradient multiplies a moment by beta. Rounding to bf16 undoes changes
# below 0.2 to 0.4 %, while beta 0.99 changes the moment by 1 %.
LARGEST_BETA = 0.99


class OptimizerSection(KindSection):
    """The optimizer, its learning rate and the bound on the gradient norm."""

    orthogonal: ClassVar[bool] = False  # true if, for matrices, the optimizer keeps only AdamW's first moment

    lr: PositiveFloat = Field(description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's decay rates of its two moments.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay. It does not apply to norms, embeddings and routers."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm. Gradients with a larger norm are scaled down to this norm. null: no clipping."""
    schedule: ScheduleSection = Field(default_factory=lambda: ConstantSchedule())
    """Learning rate as a function of the step."""

    moments: Literal["fp32", "bf16"] = "fp32"
    """Data type of the moments between steps. bf16 takes half the memory; each step rounds them to the nearest value."""

    def violations(self) -> Iterator[Violation]:
        if self.moments == "bf16" and max(self.decays) > LARGEST_BETA:
            problem = (
                f"moments=bf16, decay rates {list(self.decays)}: rounding to bf16 loses the slow changes of a moment whose "
                f"rate is above {LARGEST_BETA}; take rates up to {LARGEST_BETA}, or moments=fp32"
            )
            yield Violation(("moments", "betas"), problem)

    def keywords(self) -> dict[str, Any]:
        """See `KindSection.keywords`. Omits the keys that the optimizer does not get. The training step clips gradients and
        sets the learning rate, and the weight decay is part of the parameter groups."""
        return self.model_dump(exclude={"kind", "weight_decay", "clip_norm", "schedule"})

    @property
    def decays(self) -> tuple[float, ...]:
        """Decay rates of all moments."""
        return self.betas

    @property
    def needs_apex(self) -> bool:
        """True if a machine without NVIDIA Apex cannot run this optimizer."""
        return False
