from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Count, Decay, Fraction, KindSection, NonNegative, PositiveInt, Section


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


class OptimizerSection(KindSection):
    """The optimizer, its learning rate and the bound on the gradient norm."""

    orthogonal: ClassVar[bool] = False  # true if the optimizer keeps only AdamW's first moment for matrices

    lr: PositiveFloat = Field(description="Peak learning rate.")
    betas: tuple[Decay, Decay] = Field(default=(0.9, 0.95), description="AdamW's decay rates of its two moments.")
    eps: PositiveFloat = Field(default=1e-8, description="AdamW's epsilon.")
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay. It does not apply to norms, embeddings and routers."""
    clip_norm: PositiveFloat | None = 1.0
    """Largest global gradient norm. Gradients with a larger norm are scaled down to this norm. null: no clipping."""
    schedule: ScheduleSection = Field(default_factory=lambda: ConstantSchedule())
    """Learning rate as a function of the step."""

    def keywords(self) -> dict[str, Any]:
        """See `KindSection.keywords`. Omits keys that are not arguments of the optimizer. The training step clips gradients
        and sets the learning rate, and the weight decay is part of the parameter groups."""
        return self.model_dump(exclude={"kind", "weight_decay", "clip_norm", "schedule"})

    @property
    def needs_apex(self) -> bool:
        """True if a machine without NVIDIA Apex cannot run this optimizer."""
        return False
