"""The rules of `BiasController`: `LossFree` balances true (not null) experts. `ActiveExperts` keeps their mean number per
token at a target (LongCat-Flash, arXiv 2509.01322, section 2.1.2).

The paper calls this controller PID. It is an integral controller, because each bias is the sum of all its updates. A token
has k choices among n true experts and the router's other columns. A step has T tokens, and c_i of them choose true expert
i; c is the sum of c_i over i. After the step, bias b_i is updated in one of two ways:

    per expert, as published    b_i += mu (target / (k n) - c_i / (k T))
    per group                   b_i += mu (target - c / T) / (k n)       the mean over i of the update per expert

While the mean number of true experts is below the target the biases rise, so true experts win choices from null experts.
Both updates change the mean bias equally. The update per expert also balances the true experts. The update per group adds
the same number to the biases of all true experts, so it does not change their order.

With `proportional` = p the controller is proportional-integral, like the controller of DTop-p's bound (arXiv 2512.13996).
The update then has a second term: p times the change of the expression in brackets since the last step. After some steps
the bias is the sum of mu times each step's bracket, plus p times (last bracket - first bracket).

mu = rate / (1 + step / decay_steps). The sum of mu over steps diverges and the sum of mu^2 converges. The mean number of
true experts per token therefore converges to the target (Robbins and Monro, 1951), although the steps are noisy and the
routers change.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from moe_dist.errors import DataError
from moe_dist.placement.placement import ExpertGroup


class ActiveExperts:
    """Rule of `BiasController` that keeps the mean number of true experts per token at a target.

    Args:
        target: Target number of true experts per token, by group name. Groups without a target are not controlled.
        rate: Value of mu in the first step.
        decay_steps: Number of updates after which mu is half of `rate`; None keeps mu constant.
        ramp_steps: Number of updates in which the target moves linearly from a token's largest possible number of true
            experts to `target`.
        schedule: Pairs (first update, factor of the target), sorted by first update; the first pair has 0.
        proportional: The coefficient p. With 0 the controller is only integral.
    """

    def __init__(
        self,
        target: Mapping[str, float],
        *,
        rate: float,
        decay_steps: int | None = None,
        per: Literal["group", "expert"] = "group",
        ramp_steps: int = 0,
        schedule: Sequence[tuple[int, float]] = ((0, 1.0),),
        proportional: float = 0.0,
    ) -> None:
        self.ramp_steps, self.schedule, self.proportional = ramp_steps, tuple(schedule), proportional
        self._last: dict[str, Tensor] = {}  # by group, the errors [L, n] of the last update; only with `proportional`
        self.target, self.rate, self.decay_steps, self.per = dict(target), rate, decay_steps, per

    def target_at(self, step: int, group: ExpertGroup) -> float:
        """See `moe_dist.moe.balance.controller.AimingRule`."""
        target = self.target[group.name]
        target *= next(factor for first, factor in reversed(self.schedule) if first <= step)
        if step < self.ramp_steps:
            most = min(group.top_k, group.num_experts)
            target = most + (target - most) * step / self.ramp_steps
        return target

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """See `moe_dist.moe.balance.controller.Rule`."""
        if group.name not in self.target:
            return None
        target = self.target_at(step, group)
        mu = self.rate / (1.0 + (step / self.decay_steps if self.decay_steps is not None else 0.0))
        share_Ln = true_Ln / tokens_L1.clamp_min(1.0)
        if self.per == "group":
            share_Ln = share_Ln.mean(dim=1, keepdim=True).expand_as(share_Ln)
        error_Ln = target / group.num_experts - share_Ln
        moved_Ln = mu / group.top_k * error_Ln
        if self.proportional:
            last_Ln = self._last.get(group.name, torch.full_like(error_Ln, torch.nan))  # NaN: no step had tokens yet
            change_Ln = torch.where(last_Ln.isnan(), 0.0, error_Ln - last_Ln)
            moved_Ln = moved_Ln + self.proportional / group.top_k * change_Ln
            self._last[group.name] = torch.where(tokens_L1 > 0, error_Ln, last_Ln)
        return moved_Ln

    def state(self) -> JsonValue:
        """Returns each group's last control errors (target minus actual value), or null before the group's first step with
        tokens. Empty without `proportional`. Host sync."""
        return {
            name: [[None if math.isnan(each) else each for each in row] for row in error_Ln.tolist()]
            for name, error_Ln in self._last.items()
        }

    def restore(self, state: JsonValue, sizes: Mapping[str, tuple[int, int]], device: torch.device) -> None:
        """See `moe_dist.moe.balance.controller.RememberingRule`."""
        try:
            rows: dict[str, Any] = dict(state)  # pyright: ignore
            filled = {
                name: [[math.nan if each is None else each for each in row] for row in error]
                for name, error in rows.items()
            }
            found = {name: torch.tensor(each, dtype=torch.float64) for name, each in filled.items()}
        except (ArithmeticError, TypeError, ValueError, RuntimeError) as error:
            raise DataError(f"state of the load controller: {state!r:.80} are not errors by group") from error
        for name, error_Ln in found.items():
            if error_Ln.shape != sizes.get(name) or bool(error_Ln.isinf().any()):
                here = list(sizes[name]) if name in sizes else "no such group"
                raise DataError(
                    f"state of the load controller: group {name!r}: errors of {list(error_Ln.shape)} layers and experts, "
                    f"but the model has {here}: {rows[name]!r:.80}"
                )
        self._last = {name: error_Ln.to(device) for name, error_Ln in found.items()}


class LossFree:
    """Rule of `BiasController` that balances a group's true experts (Wang et al., arXiv 2408.15664; DeepSeek-V3, arXiv
    2412.19437).

        b_i += rate * sign(mean of c - c_i)     c_i choices of true expert i in a step

    In a group with null or zero-computation columns, the mean of all signs is subtracted from each sign. The mean bias then
    does not change. The mean bias determines the number of true experts that a token takes, and only `ActiveExperts` may
    change this number. In all other groups the mean bias affects no choice, so the published rule is used.
    """

    def __init__(self, *, rate: float) -> None:
        self.rate = rate

    def delta(self, group: ExpertGroup, true_Ln: Tensor, tokens_L1: Tensor, step: int) -> Tensor | None:
        """See `moe_dist.moe.balance.controller.Rule`."""
        # compares the integers n c_i and the sum of c, because rounding a mean could flip a sign
        sign_Ln = torch.sign(true_Ln.sum(dim=1, keepdim=True) - group.num_experts * true_Ln)
        if group.num_columns > group.num_experts:
            sign_Ln = sign_Ln - sign_Ln.mean(dim=1, keepdim=True)  # keeps the mean bias
        return self.rate * sign_Ln
