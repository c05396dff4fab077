"""What an expert's section says of its kind."""

from typing import Any, ClassVar

from moe_dist.config.section import Section


class ExpertsSection(Section):
    """What a true expert is."""

    kind: Any

    replicated: ClassVar[bool] = False  # every rank holds all: nothing is placed or sent
    over_frozen_ffn: ClassVar[bool] = False  # adapters of one FFN a layer, which the base brings

    @property
    def input_dropout(self) -> float:
        """Share of an expert's inputs that is dropped while training."""
        return 0.0
