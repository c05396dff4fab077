"""Updates selection biases after each optimizer step, by rules that read the step's counts over all ranks.

With the routers top_k, group_limited, top_p and threshold a selection bias changes only which experts a token chooses. With
relu the bias is part of the logits, and with predicted_k the bias is part of the predicted number of experts. With these
two routers the bias also changes routing weights and gradients. Only the biases of true (not null) experts are updated; the
biases of null and zero-computation experts stay 0. A rule that adds one number to all true experts' biases thus changes how
many true experts a token takes.

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
    """The part of a router that holds one group's biases: one bias for each column, true experts first."""

    bias: Tensor


class Rule(Protocol):
    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """Returns the changes of a group's biases after a step, float64 [L, n]; None if the rule does not apply to it.

        Args:
            true_Ln: float64, number of choices of each true expert over all ranks, including choices that a capacity drops.
            tokens_L1: float64, the group's tokens over all ranks. Where it is 0, the returned change is not used.
            step: Number of updates before this update.
        """
        ...


@runtime_checkable
class AimingRule(Protocol):
    """A rule that aims at a mean number of true experts per token."""

    def target_at(self, step: int, group: ExpertGroup) -> float:
        """Returns the target of a controlled group after `step` updates, in true experts per token."""
        ...


@runtime_checkable
class RememberingRule(Protocol):
    """A rule whose updates depend on the counts of earlier steps. Checkpoints save the rule's state."""

    def state(self) -> JsonValue: ...

    def restore(self, state: JsonValue, sizes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        """Restores a state that `state` returned. `sizes` has the numbers of layers and of true experts of each group.
        Raises DataError if the state is invalid."""
        ...


class BiasController:
    """Applies rules to the biases of all layers and groups. Counts cover all ranks, so all ranks get the same biases.

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
        """Updates the biases from the counts of a whole step over all ranks. In a layer without tokens of a group, the
        group's biases do not change. Call this method after the optimizer step, because recompute in backward needs the
        biases of the forward. Costs no collective and no host sync."""
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
        The biases are buffers of the model, which checkpoints contain."""
        remembering = {str(place): rule for place, rule in enumerate(self._rules) if isinstance(rule, RememberingRule)}
        rules: JsonValue = {place: state for place, rule in remembering.items() if (state := rule.state())}
        return {"step": self.step, "rules": rules} if rules else {"step": self.step}

    def restore(self, state: JsonValue) -> None:
        """Restores what `state` returned. Raises DataError if `step`, the number of updates, is invalid, or if a rule
        refuses its own state."""
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
