from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, PositiveFloat

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.lora import AdapterSection


class FFNExpertsSection(ExpertsSection):
    """Each true expert is a separate SwiGLU FFN."""

    builds = "moe_dist.moe.experts.activations:SwiGLU"
    served = "ffn"
    static = True
    replicas = True

    kind: Literal["ffn"] = "ffn"


class AdaptedFFNExpertsSection(AdapterSection, ExpertsSection):
    """Each true expert is a frozen SwiGLU FFN of the base (run.init_from), and has LoRA adapters on its matrices. Routers
    are frozen, too (PEFT's target_parameters)."""

    builds = "moe_dist.moe.experts.expert_lora:ExpertLoRA"
    served = "ffn_lora"
    adapts_ffns = True

    kind: Literal["ffn_lora"] = "ffn_lora"
    targets: tuple[Literal["gate_up", "down"], ...] = ("gate_up", "down")
    """Matrices that have an adapter. gate and up share one adapter, because transformers stores them as one matrix."""
    shared: bool = Field(default=False, description="One adapter for all experts of a group instead of one for each.")
    shared_expert: bool = Field(default=False, description="LoRA on gate, up and down of the shared expert, too.")

    def keywords(self) -> dict[str, Any]:
        return self.model_dump(include={"rank", "alpha", "targets", "shared"})

    @property
    def adapter_is_shared(self) -> bool:
        return self.shared

    @property
    def shared_expert_rank(self) -> int:
        return self.rank if self.shared_expert else 0

    def adapter_parameters(self, hidden_dim: int, ffn_dim: int) -> int:
        ends = {"gate_up": hidden_dim + 2 * ffn_dim, "down": ffn_dim + hidden_dim}
        return sum(self.rank * ends[target] for target in self.targets)

    @property
    def base(self) -> ExpertsSection:
        return FFNExpertsSection()

    def violations_in(self, config: WholeConfig) -> Iterator[Violation]:
        if self.dropout:
            problem = (
                f"model.moe.experts.dropout={self.dropout:g}: experts are not on the ranks of their tokens, and PEFT has "
                "no dropout on experts; set it to 0"
            )
            yield Violation(("model.moe.experts.dropout",), problem)
        if self.shared_expert and not config.model.moe.shared_ffn_dim:
            problem = "model.moe.experts.shared_expert=true: model.moe.shared_ffn_dim=0, no shared expert; set it to false"
            yield Violation(("model.moe.experts.shared_expert", "model.moe.shared_ffn_dim"), problem)


class ClampedFFNExpertsSection(ExpertsSection):
    """Each true expert is a separate FFN with biases and a clamped SwiGLU (gpt-oss)."""

    builds = "moe_dist.moe.experts.activations:ClampedSwiGLU"
    served = "clamped_ffn"

    kind: Literal["clamped_ffn"] = "clamped_ffn"
    alpha: PositiveFloat = Field(default=1.702, description="Factor of the gate inside the sigmoid.")
    limit: PositiveFloat = Field(default=7.0, description="Largest value of the gate, and largest absolute value of up.")

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        return 2 * ffn_dim + hidden_dim


class AdaptedClampedFFNExpertsSection(AdaptedFFNExpertsSection):
    """Each true expert is a frozen expert of the base (run.init_from) with biases and clamped SwiGLU, and has LoRA adapters
    on its matrices. Routers are frozen, too."""

    builds = "moe_dist.moe.experts.expert_lora:ExpertLoRA"
    served = "clamped_ffn_lora"

    kind: Literal["clamped_ffn_lora"] = "clamped_ffn_lora"  # pyright: ignore[reportIncompatibleVariableOverride]
    swiglu_alpha: PositiveFloat = Field(default=1.702, description="The base's factor of the gate inside the sigmoid.")
    swiglu_limit: PositiveFloat = Field(default=7.0, description="The base's largest gate, and largest absolute up.")

    @property
    def base(self) -> ClampedFFNExpertsSection:
        return ClampedFFNExpertsSection(alpha=self.swiglu_alpha, limit=self.swiglu_limit)

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        return self.base.num_biases(hidden_dim, ffn_dim)
