"""The schema of LoRA on the attention. LoRA experts are a kind of `experts`."""

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from moe_dist.config.section import Decay, Section, Violation


class AttentionLoRASection(Section):
    """LoRA adapters on the attention of every layer."""

    rank: PositiveInt = Field(description="Rank of the adapters (r).")
    alpha: PositiveFloat = Field(description="An adapter's output is scaled by alpha / rank.")
    dropout: Decay = Field(default=0.0, description="Share of an adapter's inputs that is dropped while training.")
    targets: tuple[Literal["q", "k", "v", "o"], ...] = ("q", "k", "v", "o")
    """Projections that have an adapter."""

    def violations(self) -> Iterator[Violation]:
        return target_violations(self.targets)


def target_violations(targets: tuple[str, ...]) -> Iterator[Violation]:
    """Checks that there are targets, each only once."""
    if targets and len(set(targets)) == len(targets):
        return
    fix = "name each once" if targets else "name one at least, or leave the section out"
    yield Violation(("targets",), f"targets={list(targets)}: {fix}")
