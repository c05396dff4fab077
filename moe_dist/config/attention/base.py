"""Defines the base class of the sections for attention. Their methods take the section `model`, which has all sizes."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from moe_dist.config.base.section import KindSection, Violation

WholeModel = Any  # stands for `model_schema.ModelSection`, whose import here would be circular


class AttentionSection(KindSection):
    """The kind of attention that every layer uses."""

    def violations_of(self, model: WholeModel) -> Iterable[Violation]:
        """Yields a violation for each rule that `model` breaks. The keys of a violation are relative to `model`."""
        lora, there = model.attention_lora, self.widths(model)
        if lora is not None and (unknown := [target for target in lora.targets if target not in there]):
            problem = (
                f"attention_lora.targets has {', '.join(unknown)}: attention.kind={self.kind} has the projections "
                f"{', '.join(there)}; name some of these"
            )
            yield Violation(("attention_lora.targets", "attention.kind"), problem)

    @abstractmethod
    def widths(self, model: WholeModel) -> dict[str, tuple[int, int]]:
        """Maps the name of each projection to its number of inputs and its number of outputs."""

    @abstractmethod
    def num_vectors(self, model: WholeModel) -> int:
        """Returns the number of an attention layer's parameters in biases and in norms after projections."""

    @abstractmethod
    def score_width(self, model: WholeModel) -> int:
        """Returns the number of values that all heads together have in a token's queries and in its output before
        projection `o`."""

    @abstractmethod
    def kept(self, model: WholeModel, *, frozen: bool) -> int:
        """Estimates how many elements per token autograd saves for backward, in the operations after the norm of the
        layer's input. If the weights are `frozen`, autograd does not save the inputs of projections."""

    def rotated(self, model: WholeModel) -> int:
        """Returns how many of the elements in `kept` autograd does not save if a kernel computes the rotary embedding."""
        return 0

    def norms_again(self, model: WholeModel) -> bool:
        """Returns whether kernels recompute the norm of the layer's input in backward."""
        return False
