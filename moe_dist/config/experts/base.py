from typing import Any, ClassVar

from moe_dist.config.section import Section


class ExpertsSection(Section):
    """The module that a true expert is."""

    kind: Any

    replicated: ClassVar[bool] = False  # every rank holds all experts, so that no expert is placed and no row is sent
    over_frozen_ffn: ClassVar[bool] = False  # experts are adapters over one FFN per layer, which run.init_from brings

    @property
    def input_dropout(self) -> float:
        """Share of an expert's inputs that is dropped in training."""
        return 0.0
