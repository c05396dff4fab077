"""Expert Threshold (arXiv 2603.11535): both in training and in evaluation, an expert takes each token whose score exceeds
the expert's running threshold.

    s = sigmoid(x W^T),  expert j takes the token if s_j > m_j, where m_j is the running mean of its k-th largest score
    y = sum of s_j E_j(x) over the experts j that take the token; y = 0 if no expert takes it

With `score="softmax"`, s is the softmax over the group's columns, as in `expert_choice`.

After each step `thresholds` updates m from the k-th largest scores of the selection scope, with k = ceil(c T_group), as in
expert choice. So the choice in a training step depends only on the token and on earlier steps. An expert takes
approximately the fraction c of the tokens. In the first `warmup_steps` steps experts choose by competition
(`expert_choice`), because m is not known yet. Evaluation compares scores with m plus a correction, which the last
calibration has found. Training compares scores with m alone, so calibrations do not change training.

Shape letters: T tokens of this rank, E experts of all groups.
"""

from typing import Any

import torch
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routing.types import ExpertsChoice, RoutingCache


class ExpertThresholdRouter(ExpertChoiceRouter):
    """Routes T tokens by the experts' thresholds. When the factor in `capacity_schedule` changes, m needs about 1 / (1 -
    threshold_decay) steps to reach its new value. Thresholds replace the competition after `warmup_steps` updates of m;
    `warmup_steps` is at least 1."""

    def __init__(self, context: RouterContext, *, warmup_steps: int = 100, **options: Any) -> None:
        super().__init__(context, **{"causal": "threshold", **options})
        self.warmup_steps = warmup_steps

    def _experts_choose(self, logits_TE: Tensor, group_T: Tensor, cache: RoutingCache) -> ExpertsChoice:
        """Lets experts choose tokens by competition in the first steps and with `noncausal`, and by thresholds otherwise.
        The competition always runs, because it finds the k-th largest scores."""
        choice = super()._experts_choose(logits_TE, group_T, cache)
        if not self.training:
            return choice
        mean_E, steps_E = torch.cat([gate.statistics for gate in self.gates()], dim=1)
        above_TE = (logits_TE.sigmoid() > mean_E.to(logits_TE.dtype)) & self._inside(group_T)
        taken_TE = torch.where(steps_E >= self.warmup_steps, above_TE, choice.taken_TE)
        return ExpertsChoice(taken_TE, None, choice.kth_score_E)  # no order: tokens not taken become absent pairs
