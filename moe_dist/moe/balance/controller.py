"""Updates selection biases after each optimizer step. The rules read the step's routing counts over all ranks.

With the routers top_k, group_limited, top_p and threshold a selection bias changes only which experts a token chooses. In
relu the bias is part of the logits, and in predicted_k it is part of the predicted number of experts. In these two routers
the bias therefore also changes routing weights and gradients. Only the biases of true (not null) experts are updated; the
biases of null and zero-computation experts stay 0. So adding one number to the biases of all true experts changes how many
true experts a token takes.

Shape letters: L MoE layers, G expert groups, C choice columns, n true experts of a group.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.moe.routing.counts import RoutingCounts
from moe_dist.placement.placement import ExpertGroup


class Gate(Protocol):
    """The part of a router that has one group's biases: one bias for each column, true experts first."""

    bias: Tensor


class Rule(Protocol):
    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """Returns the changes of a group's biases, float64 [L, n], or None if the rule does not control this group.

        Args:
            true_Ln: float64, number of choices of each true expert over all ranks, including dropped choices.
            tokens_L1: float64, number of the group's tokens over all ranks. If it is 0, the change is not applied.
            step: Number of updates before this update.
        """
        ...


@runtime_checkable
class AimingRule(Protocol):
    """A rule that aims at a mean number of true experts per token."""

    def target_at(self, step: int, group: ExpertGroup) -> float:
        """Returns the target of a controlled group after `step` updates: a mean number of true experts per token."""
        ...


@runtime_checkable
class RememberingRule(Protocol):
    """A rule whose updates depend on counts of earlier steps, so that checkpoints must save its state."""

    def state(self) -> JsonValue: ...

    def restore(self, state: JsonValue, sizes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        """Restores the value that `state` returned. `sizes` has each group's numbers of layers and of true experts. Raises
        DataError if the state is invalid."""
        ...


class BiasController:
    """Applies rules to the biases of all layers and groups. The counts cover all ranks, so all ranks get equal biases.

    Args:
        gates_LG: The gate of each layer and group. Each update reads the gate's `bias` again, because models may replace
            buffers.
        rules: All rules get the same counts, and their updates are added up.
    """

    def __init__(self, gates_LG: Sequence[Sequence[Gate]], groups: Sequence[ExpertGroup], rules: Sequence[Rule]) -> None:
        self._gates_LG, self._groups, self._rules = gates_LG, tuple(groups), tuple(rules)
        self.step = 0

    @torch.no_grad()
    def after_step(self, counts: RoutingCounts[Tensor]) -> None:
        """Updates the biases from the counts of a whole step over all ranks. If a layer had no tokens of a group, the
        group's biases in this layer do not change. Call this method after the optimizer step, because recomputation in
        backward needs the biases of forward. Costs no collective and no host sync."""
        for index, group in enumerate(self._groups):
            true_Ln = counts.choices_LC[:, group.first_expert : group.first_expert + group.num_experts].to(torch.float64)
            tokens_L1 = counts.tokens_LG[:, index, None].to(torch.float64)
            for rule in self._rules:
                delta_Ln = rule.delta(group, true_Ln, tokens_L1, self.step)
                if delta_Ln is not None:
                    delta_Ln = torch.where(tokens_L1 > 0, delta_Ln, 0.0)  # no update where the group has no tokens
                    for gates_G, delta_n in zip(self._gates_LG, delta_Ln, strict=True):
                        bias = gates_G[index].bias
                        bias[: group.num_experts] += delta_n.to(bias.dtype)  # in place: the bias is a buffer of the model
        self.step += 1

    def state(self) -> JsonValue:
        """Returns the number of updates so far, and the state of each `RememberingRule`, by the rule's index in `rules`.
        Checkpoints contain the biases as buffers of the model."""
        remembering = {str(place): rule for place, rule in enumerate(self._rules) if isinstance(rule, RememberingRule)}
        rules: JsonValue = {place: state for place, rule in remembering.items() if (state := rule.state())}
        return {"step": self.step, "rules": rules} if rules else {"step": self.step}

    def restore(self, state: JsonValue) -> None:
        """Restores the value that `state` returned. Raises DataError if the number of updates (`step`) is invalid, or if a
        rule rejects its state."""
        values = state if isinstance(state, dict) else {}
        step, rules = values.get("step"), values.get("rules", {})
        if type(step) is not int or not 0 <= step < 1 << 62:
            raise DataError(f"state of the load controller: {state!r:.80} is not a number of updates")
        if not isinstance(rules, dict):
            raise DataError(f"state of the load controller: rules={rules!r:.80} is no table of states")
        for place, rule in enumerate(self._rules):
            if isinstance(rule, RememberingRule):
                sizes = {group.name: (len(self._gates_LG), group.num_experts) for group in self._groups}
                rule.restore(rules.get(str(place), {}), sizes, self._gates_LG[0][0].bias.device)
        self.step = step
