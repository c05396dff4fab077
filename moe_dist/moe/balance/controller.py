"""Updates selection biases after each optimizer step, by rules on the step's counts over all ranks.

A bias changes only choices: weights, logits and gradients do not depend on it. Only the biases of true experts change.
Those of zero-computation columns stay 0, so a common shift of the true ones changes how many of them a token takes.
Shape letters: L MoE layers, G groups, C choice columns, n true experts of a group.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.placement.counts import StepCounts
from moe_dist.placement.placement import ExpertGroup


class Gate(Protocol):
    """A group's part of a router: its biases, by column, true experts first."""

    bias: Tensor


class Rule(Protocol):
    """Computes the update of a group's biases from one step's load."""

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """The update of the biases, float64 [L, n]; None if the rule does not apply to the group.

        Args:
            true_Ln: float64, choices of each true expert in the step, over all ranks, before any capacity.
            tokens_L1: float64, the group's tokens, at least 1 each: the caller leaves out layers without tokens.
            step: Updates before this one.
        """
        ...


class BiasController:
    """Applies rules to the biases of all layers and groups. All ranks compute the same, since it uses only global counts.

    Args:
        gates_LG: For each layer and group; their `bias` is looked up at each update, since a model may replace its buffers.
        groups: All groups, in logical order.
        rules: All get the same counts; their updates are added.
    """

    def __init__(self, gates_LG: Sequence[Sequence[Gate]], groups: Sequence[ExpertGroup], rules: Sequence[Rule]) -> None:
        self._gates_LG, self._groups, self._rules = gates_LG, tuple(groups), tuple(rules)
        self.step = 0

    @torch.no_grad()
    def after_step(self, counts: StepCounts[Tensor]) -> None:
        """Updates the biases; called after the optimizer step, never between forward and backward. No collective, no sync.

        Args:
            counts: Of the whole step over all ranks; a layer of a group without tokens keeps its biases.
        """
        for index, group in enumerate(self._groups):
            true_Ln = counts.choices_LC[:, group.first_expert : group.first_expert + group.num_experts].to(torch.float64)
            tokens_L1 = counts.tokens_LG[:, index, None].to(torch.float64)
            for rule in self._rules:
                delta_Ln = rule.delta(group, true_Ln, tokens_L1.clamp_min(1.0), self.step)
                if delta_Ln is not None:
                    delta_Ln = torch.where(tokens_L1 > 0, delta_Ln, 0.0)
                    for gates_G, delta_n in zip(self._gates_LG, delta_Ln, strict=True):
                        bias = gates_G[index].bias
                        bias[: group.num_experts] += delta_n.to(bias.dtype)
        self.step += 1

    def state(self) -> JsonValue:
        """The number of updates; the biases themselves are saved as buffers of the model."""
        return {"step": self.step}

    def restore(self, state: JsonValue) -> None:
        """Restores a saved state.

        Raises:
            DataError: it is invalid.
        """
        step = state.get("step") if isinstance(state, dict) else None
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise DataError(f"state of the load controller: {state!r:.80} is not a number of updates")
        self.step = step
