"""The base class of the sections of attention. Their methods take the section `model`, whose keys size every kind."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from moe_dist.config.section import Section, Violation

WholeModel = Any  # means `model_schema.ModelSection`, which cannot be imported here (circular import)


class AttentionSection(Section):
    """The attention of every layer."""

    kind: Any

    def violations_of(self, model: WholeModel) -> Iterable[Violation]:
        """Returns the rules that keys of `model` violate; the keys of a violation are relative to it."""
        return ()

    @abstractmethod
    def widths(self, model: WholeModel) -> dict[str, tuple[int, int]]:
        """Returns the number of inputs and of outputs of each projection."""

    @abstractmethod
    def num_vectors(self, model: WholeModel) -> int:
        """Returns the number of parameters in a layer that are in no matrix: biases, and norms behind projections."""

    @abstractmethod
    def score_width(self, model: WholeModel) -> int:
        """Returns the number of values of a token's queries, and of the attention's output, over all heads together."""

    @abstractmethod
    def kept(self, model: WholeModel, *, frozen: bool) -> int:
        """Returns an estimate of the elements per token that autograd keeps behind the norm of the layer's input.

        Args:
            frozen: Whether the weights are frozen, so that autograd keeps no inputs of projections.
        """
