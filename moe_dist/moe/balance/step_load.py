"""Keeps the load of each choice column over a whole step, for the balance loss of the next step.

The load-balance loss is a product of loads and mean probabilities. If loads and probabilities are of one micro-batch, the
loss depends on how the step is cut into micro-batches, and even a micro-batch of similar tokens is pushed to a uniform load
(Qiu et al., arXiv 2501.11873, count the loads over all micro-batches of a step so far). Loads have no gradient, so this
class uses the loads of the previous step, which are known before the first forward. The balance loss is then a plain sum
over the step's tokens: micro-batch size, accumulation and number of ranks change only its rounding.

Shape letters: L MoE layers, G expert groups, C choice columns.
"""

from collections.abc import Sequence

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.moe.routing.counts import StepCounts
from moe_dist.moe.routing.types import group_columns
from moe_dist.placement.placement import ExpertGroup


class StepLoad:
    """Numbers of choices and tokens over all ranks, for each group of the last step in which the group had tokens. All
    counts are 0 before the first step, whose balance loss is therefore 0.

    Attributes:
        choices_LC: float64, number of choices of each column.
        tokens_LG: float64, number of tokens of each group.
    """

    def __init__(self, groups: Sequence[ExpertGroup], num_layers: int, device: torch.device) -> None:
        self._group_C = torch.tensor(group_columns(groups), device=device)
        self.choices_LC = torch.zeros((num_layers, len(self._group_C)), dtype=torch.float64, device=device)
        self.tokens_LG = torch.zeros((num_layers, len(groups)), dtype=torch.float64, device=device)

    def after_step(self, counts: StepCounts[Tensor]) -> None:
        """Stores the counts of a whole step over all ranks. A group without tokens in a layer keeps its earlier counts.
        Costs no collective and no host sync."""
        seen_LG = counts.tokens_LG > 0
        self.choices_LC = torch.where(seen_LG[:, self._group_C], counts.choices_LC, self.choices_LC)
        self.tokens_LG = torch.where(seen_LG, counts.tokens_LG, self.tokens_LG)

    def state(self) -> JsonValue:
        """Returns the counts of choices and of tokens as lists of rows, one row per layer. Host sync."""
        return {"choices": self.choices_LC.tolist(), "tokens": self.tokens_LG.tolist()}

    def restore(self, state: JsonValue) -> None:
        """Restores a state that `state` returned.

        Raises:
            DataError: the state lacks counts for this model's layers, columns and groups.
        """
        rows = state if isinstance(state, dict) else {}
        self.choices_LC = _counts("choices", rows.get("choices"), self.choices_LC)
        self.tokens_LG = _counts("tokens", rows.get("tokens"), self.tokens_LG)


def _counts(name: str, saved: object, like: Tensor) -> Tensor:
    """Returns saved counts as a tensor of the shape, dtype and device of `like`."""
    try:
        found = torch.tensor(saved, dtype=like.dtype, device=like.device)
    except (ArithmeticError, TypeError, ValueError, RuntimeError):
        found = None
    if found is None or found.shape != like.shape or not bool((found.isfinite() & (found >= 0)).all()):
        raise DataError(
            f"state of the balance loss: {name}={saved!r:.80} are no counts of {like.shape[0]} layers x {like.shape[1]}"
        )
    return found
