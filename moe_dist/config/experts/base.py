from typing import Any, ClassVar

from moe_dist.config.base.section import Section


class ExpertsSection(Section):
    """The module, such as an FFN, of every true expert: every expert that is not null, identity or constant."""

    kind: Any

    replicated: ClassVar[bool] = False  # true if every rank holds all experts, so that no row is sent
    adapts_ffns: ClassVar[bool] = False  # true if experts are the frozen experts of run.init_from, with adapters
    over_frozen_ffn: ClassVar[bool] = False  # true if experts are adapters over one FFN per layer, from run.init_from

    def num_biases(self, hidden_dim: int, ffn_dim: int) -> int:
        """Returns the number of an expert's parameters that are in no matrix."""
        return 0

    @property
    def input_dropout(self) -> float:
        """Dropout probability of an expert's inputs in training."""
        return 0.0
