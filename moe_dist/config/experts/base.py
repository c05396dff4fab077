"""The base of the sections of experts."""

from typing import Any, ClassVar

from moe_dist.config.section import Section


class ExpertsSection(Section):
    """What a true expert is."""

    kind: Any

    replicated: ClassVar[bool] = False  # every rank holds all: nothing is placed or sent
    over_frozen_ffn: ClassVar[bool] = False  # adapters over one FFN per layer, which comes from the base

    @property
    def input_dropout(self) -> float:
        """Share of an expert's inputs that is dropped in training."""
        return 0.0
