"""The base class of the sections of attention. The methods take the section `model`, which has the sizes for all kinds of
attention."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from moe_dist.config.base.section import KindSection, Violation

WholeModel = Any  # means `model_schema.ModelSection`, which cannot be imported here (circular import)


class AttentionSection(KindSection):
    """The attention of every layer."""

    def violations_of(self, model: WholeModel) -> Iterable[Violation]:
        """Yields the rules that keys of `model` violate; the keys of a violation are relative to `model`."""
        lora, there = model.attention_lora, self.widths(model)
        if lora is not None and (unknown := [target for target in lora.targets if target not in there]):
            problem = (
                f"attention_lora.targets has {', '.join(unknown)}: attention.kind={self.kind} has the projections "
                f"{', '.join(there)}; name some of these"
            )
            yield Violation(("attention_lora.targets", "attention.kind"), problem)

    @abstractmethod
    def widths(self, model: WholeModel) -> dict[str, tuple[int, int]]:
        """Returns the number of inputs and of outputs of each projection."""

    @abstractmethod
    def num_vectors(self, model: WholeModel) -> int:
        """Returns the number of an attention layer's parameters that are in no matrix: biases, norms after projections."""

    @abstractmethod
    def score_width(self, model: WholeModel) -> int:
        """Returns the number of values of a token's queries, and of the attention's output, over all heads together."""

    @abstractmethod
    def kept(self, model: WholeModel, *, frozen: bool) -> int:
        """Estimates the number of elements per token that autograd keeps for the operations after the norm of the
        layer's input. With `frozen` weights autograd keeps no inputs of projections."""

    def rotated(self, model: WholeModel) -> int:
        """Returns how many of the elements counted by `kept` are not kept if a kernel computes the rotary embedding."""
        return 0

    def norms_again(self, model: WholeModel) -> bool:
        """Returns whether kernels compute the norm of the layer's input again in backward."""
        return False
