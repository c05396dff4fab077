"""Routers that choose a different number of experts for each token, at most `top_k`.

    T(x) = the columns, among the token's top_k columns of largest score, that the router's rule keeps
    y    = sum over T(x) without null columns of w_i E_i(x); 0 if T(x) has only null columns

A choice that the rule does not keep becomes an absent pair, like a null choice. Each router's rule reads only one token, so
evaluation is causal. A recomputed forward reuses the choices of the first forward.

Bias controllers (`moe_dist.moe.balance`) change a selection bias of each column, so that the mean number of true experts
per token stays at a target. The mean bias of a group's true columns is called the budget shift, because it changes the
number of columns that a token takes. In `top_p` and `predicted_k` only the deviations from the budget shift change the
order of the columns; in `relu` and `threshold` the whole bias of a column moves the column's threshold.

Shape letters: T tokens, D hidden size, C columns, K choices, G expert groups, E true experts.
"""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import KINDS, Normalise, TopKRouter, _Chosen
from moe_dist.moe.routing.types import Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup

TINY = 1e-20  # prevents 0 / 0 where all scores underflow


class AdaptiveRouter(TopKRouter):
    """Routes tokens, each inside its expert group, to the columns that `_kept` marks. Arguments are as in `TopKRouter`."""

    def __init__(self, context: RouterContext, *, normalise: Normalise = "none", scale: float = 1.0) -> None:
        super().__init__(context, normalise=normalise, scale=scale, selection_bias=True)

    @abstractmethod
    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        """Returns a bool [T, K] without gradient: whether a token takes each of its K best columns, the best first."""

    def _one_kernel(self, logits_TC: Tensor, cache: RoutingCache) -> bool:
        return False

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        chosen = super()._choose(masked_TC, probs_TC, group_T, cache)
        if cache.kept_TK is None:
            with torch.no_grad():
                cache.kept_TK = self._kept(masked_TC, probs_TC, chosen.column_TK, group_T, cache)
        kept_TK = chosen.valid_TK & cache.kept_TK
        return chosen._replace(valid_TK=kept_TK, true_TK=chosen.true_TK & kept_TK, null_TK=chosen.null_TK & kept_TK)

    def _shift(self, dtype: torch.dtype) -> Tensor:
        """Returns the budget shift of each group [G + 1]; the last entry, 0, is for padding (group -1)."""
        means = [self._gate(group, "bias")[: group.num_experts].mean() for group in self.groups]
        return torch.stack([*means, torch.zeros_like(means[0])]).to(dtype)

    def _by_probability(self, probs_TC: Tensor, masked_TC: Tensor) -> Tensor:
        """Returns the scores [T, C] that order columns: probability + (bias - budget shift), or -inf outside the group."""
        bias_C = self._bias(probs_TC.dtype)
        true_E = bias_C[: self.num_experts] - self._shift(probs_TC.dtype)[self.group_of_expert_E]
        score_TC = probs_TC.detach() + torch.cat([true_E, bias_C[self.num_experts :]])
        return score_TC.masked_fill(masked_TC == float("-inf"), float("-inf"))


class TopPRouter(AdaptiveRouter):
    """Top-p: a token takes its most probable columns until their probabilities add up to p (Huang et al., arXiv
    2403.07652).

        q    = softmax(x W^T) over the group's columns, in falling order q_1 >= q_2 >= ...
        T(x) = the columns i with q_1 + ... + q_(i-1) < p + b,  at least one and at most top_k
        w_i  = scale q_i, or scale times a softmax over T(x) without null columns

    b is the budget shift. A controller sets b in each layer and group, so that the mean number of true
    experts reaches the controller's target. DTop-p (arXiv 2512.13996) has one p for all layers, a proportional-integral
    controller of p, and a learned norm of the logits in each layer. In this router the controller `active_experts` changes
    p + b in each layer separately. With the key `proportional`, it is also proportional-integral. Huang et al. add the
    entropy of q to the loss. This router does not, because the controller determines the number of experts.

    Routes T tokens by cumulative probability. `p` is the initial bound on the cumulative probability, which a controller
    may change. With `normalise="none"` the weights are `scale` times probabilities, as published. With `true_chosen` the
    weights of the taken columns that are not null sum to `scale`.
    """

    def __init__(
        self, context: RouterContext, *, p: float = 0.4, normalise: Normalise = "none", scale: float = 1.0
    ) -> None:
        super().__init__(context, normalise=normalise, scale=scale)
        self.p = p

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return self._by_probability(probs_TC, masked_TC)

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        prob_TK = probs_TC.gather(1, column_TK)
        before_TK = prob_TK.cumsum(1) - prob_TK  # exactly 0 in the first column
        bound_T = (self.p + self._shift(prob_TK.dtype)[group_T]).clamp_min(torch.finfo(prob_TK.dtype).tiny)
        return before_TK < bound_T[:, None]


class ReLURouter(AdaptiveRouter):
    """ReLU routing: a token takes the columns whose logit is positive (ReMoE, arXiv 2412.14711).

        r    = ReLU(x W^T + b)
        T(x) = the columns with r_i > 0, at most the top_k largest
        w_i  = scale r_i

    A column with the logit 0 has the weight 0, so the output is a continuous function of x and of W while at most top_k
    logits are positive. b is the selection bias of a controller. ReMoE itself controls the number of experts by the
    coefficient of an L1 loss: it multiplies the coefficient by 1.2 after a step with too many experts, and divides it by
    1.2 after a step with too few. Here the balance loss `vanilla` equals ReMoE's loss, in which f_i is the load, up to the
    factor k, because the balance loss uses the unnormalised r as probabilities. Its coefficient follows
    `loss.balance.schedule`. The reported entropy is the entropy of r / sum(r).

    A token may take no expert. If a token takes a null column, the column adds 0 to the output and uses one of the token's
    top_k choices.

    Routes T tokens by positive logits. `TopKRouter` describes `scale`.
    """

    def __init__(self, context: RouterContext, *, scale: float = 1.0) -> None:
        super().__init__(context, scale=scale)

    def _logits(self, h_TD: Tensor) -> Tensor:
        return super()._logits(h_TD) + self._bias(h_TD.dtype)

    def _probs(self, masked_TC: Tensor) -> Tensor:
        return masked_TC.relu()  # 0 where the logit is -inf (outside the token's group)

    def _shares(self, probs_TC: Tensor) -> Tensor:
        return probs_TC / probs_TC.sum(-1, keepdim=True).clamp_min(torch.finfo(probs_TC.dtype).tiny)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return masked_TC.detach()

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        return masked_TC.gather(1, column_TK) > 0


class ThresholdRouter(AdaptiveRouter):
    """Routes by trained thresholds. A token takes each column whose score exceeds the column's learned threshold (the
    top-any gate of DynMoE, arXiv 2405.14297).

        s    = sigmoid(cos(x, W_i) / temperature),   c = sigmoid(G)
        T(x) = the columns with s_i - c_i + b_i > 0, at most the top_k largest
        w_i  = scale / (number of columns of T(x) that are not null)

    b is the selection bias of a controller; with b = 0 the rule is DynMoE's published rule. Backward treats the sign
    function as the identity, like the authors' DeepSpeed code. The derivative of w_i by s_i - c_i is thus scale / (number
    of taken columns) if column i is taken, else 0. Some parts of DynMoE are missing here: a temperature that divides G;
    losses that make router rows diverse and small; a loss on the mean of the gates; and a number of experts that changes
    during training. Also missing is DynMoE's rule that evaluation gives a token without experts its best expert, because
    this would change the number of experts.

    The balance loss and the reported entropy use s / (sum of s) as probabilities.

    Routes T tokens by learned thresholds. Each group's gate also has the parameter `level` [columns], initially 0. `level`
    is the G of the formula above, so sigmoid(level) is a column's threshold. `temperature` divides the cosines. DynMoE's
    Tutel code learns it, from the initial value 0.1.
    """

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


class PredictedKRouter(AdaptiveRouter):
    """Predicted k: a linear head predicts a token's number of columns from its hidden state, as in Ada-K (arXiv
    2410.10456).

        k(x) = top_k sigmoid(<u, x> + b),   T(x) = the ceil(k(x)) most probable columns of softmax(x W^T)
        m_j  = min(1, k(x) - (j - 1)) for the j-th of them: 1, but the fractional rest of k(x) for the last one
        w_j  = scale m_j v_j,   v a softmax over T(x) without null columns, or the softmax over all columns

    Ada-K samples an integer k and trains its predictor by policy gradient. This router instead multiplies the weight of the
    last taken column by the fractional part of k(x), like the remainder in Adaptive Computation Time (Graves, arXiv
    1603.08983). The loss therefore gives u a gradient. If v is the softmax over all columns, the output is a continuous
    function of k(x). If v is the softmax over T(x), every added column changes all weights. b is the budget shift.

    Routes T tokens to a predicted number of columns. Each group's gate also has the parameter `number` [1, D], the vector u
    in k(x). With `normalise="true_chosen"`, v is the softmax over the chosen columns that are not null. With `none`, v is
    the softmax over all columns.
    """

    def __init__(self, context: RouterContext, *, normalise: Normalise = "none", scale: float = 1.0) -> None:
        super().__init__(context, normalise=normalise, scale=scale)
        for group in self.groups:
            self.gate(group).register_parameter("number", nn.Parameter(torch.empty(1, context.hidden_dim)))

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        """See `TopKRouter.forward`."""
        cache = cache or RoutingCache()
        with torch.autocast(device_type=h_TD.device.type, enabled=False):  # autocast would run the router in bf16
            cache.number_T = self._number(h_TD.to(accumulation_dtype(h_TD.dtype)), group_T)
        return super().forward(h_TD, group_T, cache)

    def _number(self, h_TD: Tensor, group_T: Tensor) -> Tensor:
        """Returns k(x) [T], 0 for padding."""
        rows_GD = torch.cat([self._gate(group, "number") for group in self.groups]).to(h_TD.dtype)
        number_TG = (h_TD @ rows_GD.T + self._shift(h_TD.dtype)[:-1]).sigmoid() * self.top_k_G[:-1]
        member_TG = group_T[:, None] == torch.arange(len(self.groups), device=group_T.device)
        return torch.where(member_TG, number_TG, 0.0).sum(1)

    def _selection_scores(self, masked_TC: Tensor, probs_TC: Tensor) -> Tensor:
        return self._by_probability(probs_TC, masked_TC)

    def _factor(self, cache: RoutingCache) -> Tensor:
        """Returns the factors m [T, K], which are at most 1, and at most 0 for columns that the token does not take."""
        assert cache.number_T is not None
        place_K = torch.arange(self.num_choices, device=cache.number_T.device)
        return (cache.number_T[:, None] - place_K).clamp_max(1.0)

    def _kept(self, masked_TC: Tensor, probs_TC: Tensor, column_TK: Tensor, group_T: Tensor, cache: RoutingCache) -> Tensor:
        return self._factor(cache) > 0

    def _choose(self, masked_TC: Tensor, probs_TC: Tensor, group_T: Tensor, cache: RoutingCache) -> _Chosen:
        return super()._choose(masked_TC, probs_TC, group_T, cache)._replace(factor_TK=self._factor(cache))

    def _weights(self, masked_TC: Tensor, probs_TC: Tensor, chosen: _Chosen) -> Tensor:
        assert chosen.factor_TK is not None
        return super()._weights(masked_TC, probs_TC, chosen) * chosen.factor_TK
