from typing import Any, ClassVar

from moe_dist.config.section import Section


class ExpertsSection(Section):
    """The kind of module that each true expert is, such as an FFN."""

    kind: Any

    replicated: ClassVar[bool] = False  # true if every rank holds all experts, so that no row is sent
    over_frozen_ffn: ClassVar[bool] = False  # true if experts are adapters of one FFN per layer, loaded by run.init_from

    @property
    def input_dropout(self) -> float:
        """Dropout probability of an expert's inputs in training."""
        return 0.0
