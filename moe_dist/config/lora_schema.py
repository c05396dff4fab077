"""The schema of adapters: what the experts of a group are, and LoRA on the attention. `schema` has the whole."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.section import Decay, Section, Violation


class FFNExpertsSection(Section):
    """Each true expert is an FFN of its own."""

    kind: Literal["ffn"] = Field(default="ffn", description="Each true expert is an FFN of its own.")


class LoRAExpertsSection(Section):
    """The true experts are LoRA adapters over one frozen FFN a layer, which every token passes (LLaVA-MoLE)."""

    kind: Literal["lora"] = Field(
        default="lora",
        description="The true experts are LoRA adapters over one frozen FFN a layer, which every token passes "
        "(LLaVA-MoLE).",
    )
    rank: PositiveInt = Field(description="Rank of each expert's adapters (r).")
    alpha: PositiveFloat = Field(description="An adapter's output is scaled by alpha / rank.")
    dropout: Decay = Field(default=0.0, description="Share of an adapter's inputs that is dropped while training.")
    targets: tuple[Literal["gate", "up", "down"], ...] = Field(
        default=("gate", "up", "down"),
        description="Projections of the FFN that have adapters; all share the token's route.",
    )
    weight: Literal["probability", "straight_through", "published"] = Field(
        default="probability",
        description="Weight of a chosen expert: its probability p among all columns; p / p, whose value is 1 and whose "
        "gradient is p's; or 1 as published, where the task teaches the router nothing.",
    )

    def violations(self) -> list[Violation]:
        return target_violations(self.targets)


ExpertsSection = Annotated[FFNExpertsSection | LoRAExpertsSection, Field(discriminator="kind")]


class AttentionLoRASection(Section):
    """LoRA adapters on the attention of every layer."""

    rank: PositiveInt = Field(description="Rank of the adapters (r).")
    alpha: PositiveFloat = Field(description="An adapter's output is scaled by alpha / rank.")
    dropout: Decay = Field(default=0.0, description="Share of an adapter's inputs that is dropped while training.")
    targets: tuple[Literal["q", "k", "v", "o"], ...] = Field(
        default=("q", "k", "v", "o"), description="Projections that have an adapter."
    )

    def violations(self) -> list[Violation]:
        return target_violations(self.targets)


def target_violations(targets: tuple[str, ...]) -> list[Violation]:
    """Some target, and each once."""
    if targets and len(set(targets)) == len(targets):
        return []
    fix = "name each once" if targets else "name one at least, or leave the section out"
    return [Violation(("targets",), f"targets={list(targets)}: {fix}")]
