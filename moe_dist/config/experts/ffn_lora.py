"""Defines the section of experts that are FFNs of a frozen base with LoRA adapters."""

from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field

from moe_dist.config.base.section import Violation, WholeConfig
from moe_dist.config.experts.base import ExpertsSection
from moe_dist.config.experts.ffn import FFNExpertsSection
from moe_dist.config.experts.lora import AdapterSection


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
