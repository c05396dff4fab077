"""Expert choice: experts choose tokens, inside the group of each modality (MoMa, arXiv 2407.21770, section 2.2).

    s = sigmoid(x W^T) over the group's columns,  expert j takes its k = ceil(c T_group) tokens of largest s_j
    y = sum of s_j E_j(x) over the experts j that take the token; y = 0 if no expert takes it

The choice of experts among tokens depends on later tokens, so only training uses expert choice (`selection`). Evaluation
uses one of two causal rules:

    threshold   expert j takes the token if s_j > c_j, the running k-th largest score (Expert Threshold, arXiv 2603.11535)
    auxiliary   expert j takes the token if sigmoid(SiLU(x W_1) W_2)_j > 0.5 (MoMa, sec. 2.4); a second run trains W_1, W_2

Under both rules the routing weights are s_j. With `score="softmax"`, s is the softmax over the group's columns. The code
then still computes sigmoids: `softmax_logits` returns logits whose sigmoids are the softmax. Shape letters: T tokens of
this rank, U tokens of the selection scope, D hidden size, E experts of all groups, n experts of one group, G groups, K
experts of the largest group.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.kernels.interface import ExpertsSums, ExpertsTables
from moe_dist.moe.kernels.torch_kernels import accumulation_dtype
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.selection import (
    OUTSIDE,
    AuxiliaryRouter,
    Causal,
    ChoosingRouter,
    by_token,
    counted_pairs,
    recorded,
    token_pairs,
)
from moe_dist.moe.routers.top_k import GroupGate
from moe_dist.moe.routing.counts import AuxSums, RoutingCounts
from moe_dist.moe.routing.draws import logistic
from moe_dist.moe.routing.types import ABSENT, Assignments, ExpertsChoice, GlobalBatchInfo, Routing, RoutingCache
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup

Score = Literal["sigmoid", "softmax"]
STATISTICS = 2  # rows of `ChoiceGate.statistics`: the running mean of the k-th largest score, and the number of steps


class ChoiceGate(GroupGate):
    """One group's router rows, `true` [n, D], and the thresholds of the group's experts.

    `threshold` [n] and `statistics` [2, n] (see `moe_dist.moe.thresholds`) are buffers without gradient. They are equal on
    all ranks, and checkpoints contain them. `auxiliary` exists if evaluation uses auxiliary routers.
    """

    threshold: Tensor
    statistics: Tensor

    def __init__(self, hidden_dim: int, group: ExpertGroup, *, auxiliary: bool) -> None:
        super().__init__(hidden_dim, group)
        if auxiliary:
            self.auxiliary = AuxiliaryRouter(hidden_dim, group.num_experts)

    def running_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns three buffers [n]: thresholds, running means of the k-th largest score, and numbers of steps."""
        mean_n, steps_n = self.statistics
        return self.threshold, mean_n, steps_n


class ExpertChoiceRouter(ChoosingRouter):
    """Routes T tokens: experts choose among the tokens of their group. No group may have null or zero-computation experts.

    The fields of `context` have these effects. The tokens of `selection_scope` compete. With `known_counts` and a scope of
    one rank, the assignments of training contain `counts_WE`, so that dispatch needs no host sync. If `kernels` has
    `experts_choose`, kernels compute the router's sums. With a scope of one rank they also make the choice.

    Args:
        capacity: c, the fraction of its group's tokens that each expert takes: one number, or a number by group name. If a
            group has no number, its c is `ExpertGroup.token_share`, or top_k / num_experts if `token_share` is None.
        capacity_schedule: Pairs (first step, factor of c), sorted by first step; the first pair has step 0. The step is
            read from `batch_info.step` in training, and from `noncausal_step` without `batch_info`.
        score: The kind of scores: sigmoids of logits, or the softmax of a group's logits.
        noise: Scale of the Gumbel-sigmoid noise that training adds to the logits. MoMa uses 1.
        causal: The rule by which evaluation routes a token without reading other tokens. None makes evaluation fail.
        threshold_decay: Decay per step of the running means that give the thresholds.
    """

    group_of_expert_E: Tensor
    share_E: Tensor
    columns_GK: Tensor  # experts of each group; the last row, all ABSENT, is for padding (group -1)

    def __init__(
        self,
        context: RouterContext,
        *,
        capacity: float | Mapping[str, float] | None = None,
        capacity_schedule: Sequence[tuple[int, float]] = ((0, 1.0),),
        score: Score = "sigmoid",
        noise: float = 0.0,
        causal: Causal | None = None,
        threshold_decay: float = 0.99,
    ) -> None:
        super().__init__()
        self.groups = groups = tuple(context.groups)
        self.causal: Causal | None = causal
        self.selection_scope, self.known_counts = context.selection_scope, context.known_counts
        self.score: Score = score
        self.threshold_decay, self.noise = threshold_decay, noise
        self.seed, self.layer, self.kernels = context.seed, context.layer, context.kernels
        self.num_experts = sum(group.num_experts for group in groups)
        named = capacity if isinstance(capacity, Mapping) else dict.fromkeys([group.name for group in groups], capacity)
        self.share_of_group = tuple(named.get(group.name) or share_of_group_tokens(group) for group in groups)
        self.capacity_schedule = tuple(capacity_schedule)
        for group in groups:
            gate = ChoiceGate(context.hidden_dim, group, auxiliary=causal == "auxiliary")
            self.add_module(group_module(group.name), gate)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Creates the buffers (constants, and thresholds of 0, which admit every token) on the default device. Call this
        method again after moving the module from the meta device, where buffers have no values."""
        most = max(group.num_experts for group in self.groups)
        rows = [[*group.experts, *[ABSENT] * (most - group.num_experts)] for group in self.groups]
        self.group_of_E = [index for index, group in enumerate(self.groups) for _ in group.experts]
        self.register_buffer("group_of_expert_E", torch.tensor(self.group_of_E), persistent=False)
        shares = torch.tensor([self.share_of_group[index] for index in self.group_of_E], dtype=torch.float64)
        self.register_buffer("share_E", shares, persistent=False)
        self.register_buffer("columns_GK", torch.tensor([*rows, [ABSENT] * most]), persistent=False)
        for gate, group in zip(self.gates(), self.groups, strict=True):
            gate.register_buffer("threshold", torch.zeros(group.num_experts))
            gate.register_buffer("statistics", torch.zeros(STATISTICS, group.num_experts))

    def gates(self) -> list[ChoiceGate]:
        return [self.get_submodule(group_module(group.name)) for group in self.groups]  # pyright: ignore[reportReturnType]

    def num_taken(self, found: Routing) -> Tensor:
        return found.counts.choices_LC[0]

    def forward(self, h_TD: Tensor, group_T: Tensor, cache: RoutingCache | None = None) -> Routing:
        """Routes the tokens `h_TD`. `group_T` (int64) has each token's group, or -1 for padding, which is not routed.

        All arithmetic is fp32 (float64 for a float64 model). Costs no host sync. If the selection scope has several ranks,
        training costs one collective, see `selection`.
        """
        dtype = accumulation_dtype(h_TD.dtype)
        cache = cache or RoutingCache()
        with torch.autocast(device_type=h_TD.device.type, enabled=False):
            h_TD = h_TD.to(dtype)
            logits_TE = self._logits(h_TD)
            noisy_TE = self._with_noise(logits_TE, cache)
            weight_TE = noisy_TE.sigmoid()
            by_choice = self.training or self.noncausal
            if cache.choice is None:
                with torch.no_grad():
                    if by_choice:
                        cache.choice = self._experts_choose(logits_TE, group_T, cache)
                    else:
                        cache.choice = self._tokens_pass(h_TD, logits_TE, self._inside(group_T))
            counts, aux = self._sums(logits_TE, cache.choice, group_T)
            if self.training and self.causal == "auxiliary":
                terms_G = self._auxiliary_terms(h_TD, cache.choice.taken_TE, self._inside(group_T))
                aux = aux._replace(auxiliary_LG=terms_G[None])
        pairs = self._pairs(cache.choice, weight_TE, group_T, cache.batch_info if by_choice else None)
        if not cache.keep_choices:
            return Routing(pairs, counts, aux)
        return Routing(pairs, counts, aux, chosen=recorded(cache.choice.taken_TE, weight_TE, self.columns_GK[group_T]))

    def _inside(self, group_T: Tensor) -> Tensor:
        """Returns a temporary bool [T, E]: whether the token belongs to the expert's group."""
        return group_T[:, None] == self.group_of_expert_E

    @property
    def _tables(self) -> ExpertsTables:
        return ExpertsTables(self.group_of_expert_E, self.share_E, len(self.groups))

    def _uses_kernels(self, logits_TE: Tensor) -> bool:
        return self.kernels.has_choose and logits_TE.dtype == torch.float32

    def _logits(self, h_TD: Tensor) -> Tensor:
        """Returns logits [T, E]. Their sigmoids are the scores of all experts for tokens of all groups."""
        logits_TE = F.linear(h_TD, torch.cat([gate.get_parameter("true") for gate in self.gates()]).to(h_TD.dtype))
        if self.score == "sigmoid":
            return logits_TE
        of_groups = logits_TE.split([group.num_experts for group in self.groups], dim=1)
        return torch.cat([softmax_logits(logits_Tn) for logits_Tn in of_groups], dim=1)

    @torch.no_grad()
    def scores(self, h_TD: Tensor, group_T: Tensor) -> Tensor:
        """Returns scores [T, E] without noise; 0 for experts outside of the token's group."""
        dtype = accumulation_dtype(h_TD.dtype)
        with torch.autocast(device_type=h_TD.device.type, enabled=False):
            logits_TE = self._logits(h_TD.to(dtype))
        return torch.where(group_T[:, None] == self.group_of_expert_E, logits_TE.sigmoid(), 0.0)

    def _factor(self, batch_info: GlobalBatchInfo | None) -> float:
        """Returns this step's factor of the capacities."""
        step = self.noncausal_step if batch_info is None else batch_info.step
        return next(factor for first, factor in reversed(self.capacity_schedule) if first <= step)

    def _with_noise(self, logits_TE: Tensor, cache: RoutingCache) -> Tensor:
        """Returns the logits of this rank's tokens plus noise, or `logits_TE` itself if there is no noise."""
        if not (self.training and self.noise):
            return logits_TE
        batch_info, token_T = cache.batch_info, cache.token_T
        assert batch_info is not None, "noise needs the step and the tokens' numbers, which come with the micro-batch"
        token_T = torch.arange(logits_TE.shape[0], device=logits_TE.device) if token_T is None else token_T
        token_T = token_T + batch_info.first_token_of(batch_info.rank)
        return logits_TE + self._draw(token_T, batch_info, logits_TE.dtype)

    def _draw(self, token_T: Tensor, batch_info: GlobalBatchInfo, dtype: torch.dtype) -> Tensor:
        expert_E = torch.arange(self.num_experts, device=token_T.device)
        return self.noise * logistic((self.seed, batch_info.step, self.layer), token_T, expert_E, dtype)

    def _experts_choose(self, logits_TE: Tensor, group_T: Tensor, cache: RoutingCache) -> ExpertsChoice:
        """Lets experts choose tokens. Each rank draws the noise of the whole scope, so ranks exchange only logits."""
        where, device, batch_info = self.selection_scope, logits_TE.device, cache.batch_info
        lengths = where.lengths(logits_TE.shape[0], batch_info)

        def add_noise(logits_UE: Tensor) -> Tensor:
            assert batch_info is not None
            ranks = [batch_info.rank] if where.kind == "rank" else where.ranks
            starts = [batch_info.first_token_of(rank) for rank in ranks]
            tokens = [torch.arange(n, device=device) + start for n, start in zip(lengths, starts, strict=True)]
            return logits_UE + self._draw(torch.cat(tokens), batch_info, logits_UE.dtype)

        noise = add_noise if self.training and self.noise else None
        factor = self._factor(batch_info)
        # An expert with share 1 takes all tokens, and its threshold is 0. Rounds, because 49 x 1/49 is below 1 in float.
        share_E = self.share_E if factor == 1.0 else (factor * self.share_E).round(decimals=15)
        if self._uses_kernels(logits_TE) and len(lengths) == 1:
            tables = self._tables._replace(share_E=share_E)
            taken_TE, order_TE, kth_score_E = self.kernels.experts_choose(logits_TE, group_T, tables, noise)
            return ExpertsChoice(taken_TE, order_TE, kth_score_E)
        masked_TE = logits_TE.masked_fill(~self._inside(group_T), OUTSIDE)
        options: dict[str, Any] = {"layer": f"layers.{self.layer}", "add_noise": noise, "token_T": cache.token_T}
        choice = where.choose(masked_TE, share_E, lengths, **options)
        # An expert with a capacity of 1 takes all tokens of its group, so its threshold must be 0.
        return choice._replace(kth_score_E=torch.where(share_E < 1.0, choice.kth_score_E, 0.0))

    def _tokens_pass(self, h_TD: Tensor, logits_TE: Tensor, inside_TE: Tensor) -> ExpertsChoice:
        """Decides by evaluation's causal rule which experts take each token. Each decision reads only one token."""
        if self.causal == "threshold":
            passes_TE = logits_TE.sigmoid() > self._thresholds(logits_TE.dtype)
        elif self.causal == "auxiliary":
            passes_TE = self._auxiliary_logits(h_TD) > 0.0
        else:
            raise AssertionError("model.moe.router.causal is null: the choice of training looks at later tokens")
        return ExpertsChoice(passes_TE & inside_TE, None, logits_TE.new_zeros(self.num_experts))

    def _thresholds(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([gate.threshold for gate in self.gates()]).to(dtype)

    def _auxiliary_logits(self, h_TD: Tensor) -> Tensor:
        return torch.cat([gate.auxiliary(h_TD) for gate in self.gates()], dim=1)

    def _auxiliary_terms(self, h_TD: Tensor, taken_TE: Tensor, inside_TE: Tensor) -> Tensor:
        """Returns the binary cross entropy of each group's auxiliary routers [G], summed over tokens and experts. Its
        targets are the choices that experts make in training."""
        logits_TE = self._auxiliary_logits(h_TD.detach())  # detached, to train only the auxiliary routers
        losses_TE = F.binary_cross_entropy_with_logits(logits_TE, taken_TE.to(logits_TE.dtype), reduction="none")
        by_expert_E = torch.where(inside_TE, losses_TE, 0.0).sum(0)
        # A group's experts are consecutive. Indexing by a list would copy the list to the device, and the host would wait.
        return torch.stack([part.sum() for part in by_expert_E.split([group.num_experts for group in self.groups])])

    def _pairs(
        self, choice: ExpertsChoice, weight_TE: Tensor, group_T: Tensor, batch_info: GlobalBatchInfo | None
    ) -> Assignments:
        if batch_info is None or choice.order_TE is None:
            return token_pairs(choice.taken_TE, weight_TE, self.columns_GK[group_T])
        factor = self._factor(batch_info)
        shares = [factor * self.share_of_group[index] for index in self.group_of_E]
        pairs = counted_pairs(choice, weight_TE, shares, self.group_of_E, batch_info, self.selection_scope.ep_ranks)
        return pairs if self.known_counts else by_token(pairs, weight_TE.shape[0])  # sorting needs no sync

    @torch.no_grad()
    def _sums(self, logits_TE: Tensor, choice: ExpertsChoice, group_T: Tensor) -> tuple[RoutingCounts[Tensor], AuxSums]:
        make = self.kernels.experts_sums if self._uses_kernels(logits_TE) else _experts_sums
        made = make(logits_TE, group_T, self._tables, self._thresholds(logits_TE.dtype), choice.taken_TE)
        counts = RoutingCounts(
            choices_LC=made.choices_E[None],
            tokens_LG=made.tokens_G[None],
            entropy_LG=made.entropy_G[None],
            dropped_LE=torch.zeros_like(self.group_of_expert_E)[None],
            kth_score_LE=(choice.kth_score_E.to(torch.float64) * made.tokens_G[self.group_of_expert_E])[None],
            above_LE=made.above_E[None],
            unrouted_LG=made.unrouted_G[None],
        )
        # Sigmoids have no z-loss.
        return counts, AuxSums(made.prob_E[None], logits_TE.new_zeros((1, len(self.groups))))


def _experts_sums(
    logits_TE: Tensor, group_T: Tensor, tables: ExpertsTables, threshold_E: Tensor, taken_TE: Tensor
) -> ExpertsSums:
    """`RowKernels.experts_sums` by operations of torch."""
    inside_TE = group_T[:, None] == tables.group_E
    member_TG = group_T[:, None] == torch.arange(tables.num_groups, device=group_T.device)
    score_TE = torch.where(inside_TE, logits_TE.sigmoid(), 0.0)
    # A token's scores are divided by their sum, so that the entropy is comparable with a softmax's entropy.
    shares_TE = score_TE / score_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(score_TE.dtype).tiny)
    entropy_T = -torch.xlogy(shares_TE, shares_TE).sum(-1)
    idle_T = ~taken_TE.any(-1)
    above_TE = inside_TE & (score_TE > threshold_E)
    return ExpertsSums(
        choices_E=taken_TE.sum(0),
        tokens_G=member_TG.sum(0),
        above_E=above_TE.sum(0).to(torch.float64),
        unrouted_G=(member_TG & idle_T[:, None]).sum(0).to(torch.float64),
        prob_E=score_TE.sum(0),
        entropy_G=entropy_T @ member_TG.to(score_TE.dtype),
    )


def softmax_logits(logits_Tn: Tensor) -> Tensor:
    """Returns the logits whose sigmoids are the softmax p of `logits_Tn`, n > 1: ln p_j - ln(1 - p_j)."""
    log_p_Tn = logits_Tn.log_softmax(1)
    # If the largest p is near 1, the difference 1 - p loses digits. The sum of all other probabilities has these digits.
    largest_Tn = F.one_hot(log_p_Tn.argmax(1), log_p_Tn.shape[1]).to(torch.bool)
    others_T1 = log_p_Tn.masked_fill(largest_Tn, OUTSIDE).logsumexp(1, keepdim=True)
    return log_p_Tn - torch.where(largest_Tn, others_T1, torch.log1p(-log_p_Tn.exp().masked_fill(largest_Tn, 0.0)))


def share_of_group_tokens(group: ExpertGroup) -> float:
    """Returns a group's capacity c: its `token_share`, or else the value for a mean of `top_k` experts per token."""
    return group.token_share if group.token_share is not None else group.top_k / group.num_experts
