from typing import Any, ClassVar

from moe_dist.config.section import Section


class ExpertsSection(Section):
    """The module that a true expert is."""

    kind: Any

    replicated: ClassVar[bool] = False  # true if every rank holds all experts, so that no row is sent
    over_frozen_ffn: ClassVar[bool] = False  # true if experts adapt one FFN per layer, which run.init_from brings

    @property
    def input_dropout(self) -> float:
        """Share of an expert's inputs that is dropped in training."""
        return 0.0
