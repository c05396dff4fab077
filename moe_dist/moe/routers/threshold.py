"""Routes by trained thresholds. A token takes each column whose score exceeds the column's learned threshold (the top-any
gate of DynMoE, arXiv 2405.14297).

    s    = sigmoid(cos(x, W_i) / temperature),   c = sigmoid(G)
    T(x) = the columns with s_i - c_i + b_i > 0, at most the top_k largest
    w_i  = scale / (number of columns of T(x) that are not null)

b is the selection bias of a controller; with b = 0 the rule is DynMoE's published rule. Backward treats the sign function
as the identity, like the authors' DeepSpeed code. The derivative of w_i by s_i - c_i is thus scale / (number of taken
columns) if column i is taken, else 0. Some parts of DynMoE are missing here: a temperature that divides G; losses that make
router rows diverse and small; a loss on the mean of the gates; and a number of experts that changes during training. Also
missing is DynMoE's rule that evaluation gives a token without experts its best expert, because this would change the number
of experts.

The balance loss and the reported entropy use s / (sum of s) as probabilities. Shape letters: T tokens, D hidden size, C
columns, K choices.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.routers.adaptive import AdaptiveRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import KINDS, _Chosen
from moe_dist.moe.routing.types import RoutingCache
from moe_dist.placement.placement import ExpertGroup

TINY = 1e-20  # prevents 0 / 0 where all scores underflow


class ThresholdRouter(AdaptiveRouter):
    """Routes T tokens by learned thresholds. Each group's gate also has the parameter `level` [columns], initially 0.
    `level` is the G of the formula above, so sigmoid(level) is a column's threshold. `temperature` divides the cosines.
    DynMoE's Tutel code learns it, from the initial value 0.1."""

    def __init__(self, context: RouterContext, *, temperature: float = 0.1, scale: float = 1.0) -> None:
        super().__init__(context, scale=scale)
        self.temperature = temperature
        for group in self.groups:
            self.gate(group).register_parameter("level", nn.Parameter(torch.zeros(group.num_columns)))

    def _gate(self, group: ExpertGroup, name: str) -> Tensor:
        found = super()._gate(group, name)
        return F.normalize(found, dim=-1) if name in KINDS else found

    def _logits(self, h_TD: Tensor) -> Tensor:
        return super()._logits(F.normalize(h_TD, dim=-1)) / self.temperature

    def _probs(self, masked_TC: Tensor) -> Tensor:
        score_TC = masked_TC.sigmoid()  # 0 where the logit is -inf (outside the token's group)
        return score_TC / (score_TC.sum(dim=-1, keepdim=True) + TINY)

    def _margins(self, masked_TC: Tensor) -> Tensor:
        """Returns s - c, the score minus the threshold, [T, C]; -inf for columns outside of the token's group."""
        margin_TC = masked_TC.sigmoid() - self._of_columns("level", masked_TC.dtype).sigmoid()
        return margin_TC.masked_fill(masked_TC == float("-inf"), float("-inf"))

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        with torch.no_grad():
            return self._margins(masked_TC) + self._bias(masked_TC.dtype)

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        return self._selection_scores(masked_TC, probs_TC).gather(1, column_TK) > 0

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        counted_TK = chosen.valid_TK ^ chosen.null_TK  # without null choices

        # -inf for columns that are not taken would give NaN gradients despite the mask
        margin_TK = torch.where(counted_TK, self._margins(masked_TC).gather(1, chosen.column_TK), 0.0)
        number_T1 = counted_TK.sum(1, keepdim=True).clamp_min(1)
        return self.scale * torch.where(counted_TK, 1.0 + (margin_TK - margin_TK.detach()), 0.0) / number_T1
