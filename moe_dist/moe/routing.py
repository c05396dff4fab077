"""Types that pass between router, dispatcher and training step: assignments, sums, reports.

Shape letters: T tokens on this rank, E true experts (logical, over all groups), K choices per token, N (token, expert)
pairs, G groups, W ranks, A probe tokens, F zero-computation columns (identity and constant experts), C choice columns: the
E true experts, then all groups' null, identity and constant experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moe_dist.placement.placement import ExpertGroup

ABSENT = -1  # expert id of a pair that is not taken, as in DeepEP


class Assignments(NamedTuple):
    """The (token, expert) pairs of one layer. The dispatcher sees no other part of the routing.

    N, the number of pairs, is static (T x K for token choice), so that no shape before the dispatcher's host sync depends
    on data. Taken pairs are unique.

    Attributes:
        token_N: int64, token of each pair.
        expert_N: int64, logical expert of each pair; ABSENT if no pair is taken (a null choice, padding).
        weight_N: Routing weight with gradient, fp32 (float64 in a float64 model); 0 for absent pairs.
        counts_WE: Number of pairs of each EP rank and logical expert, equal on all ranks. None if reading the routing is
            needed to know it, as with token choice. If known, as with expert choice within one rank, every pair is taken
            and pairs are sorted by expert.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    counts_WE: tuple[tuple[int, ...], ...] | None = None

    def taken(self) -> "Assignments":
        """Only the taken pairs, for tests and pictures. Syncs on CUDA, because their number depends on data."""
        keep = self.expert_N != ABSENT
        return Assignments(self.token_N[keep], self.expert_N[keep], self.weight_N[keep])


class ChoiceSums(NamedTuple):
    """Further sums of expert choice over this rank's tokens in one layer: float64, without gradient.

    Attributes:
        kth_score_E: The k-th largest score of each expert in its selection scope, times the tokens of its group.
        above_E: Number of tokens whose score is above the expert's threshold.
        unrouted_G: Number of tokens that no expert takes.
    """

    kth_score_E: Tensor
    above_E: Tensor
    unrouted_G: Tensor


class RouterSums(NamedTuple):
    """Sums over this rank's routed tokens in one layer, for balance losses and monitoring.

    Attributes:
        choices_C: int64, number of choices of each column, before any capacity.
        prob_C: Sum over tokens of the group's softmax probabilities, differentiable.
        tokens_G: int64, number of routed tokens.
        log_z_squared_G: Sum of squared log-sum-exp of the group's logits, differentiable.
        entropy_G: Sum over tokens of the softmax's entropy in nats, without gradient.
        dropped_E: int64, choices of each true expert that a capacity dropped.
        choice: Further sums of expert choice; None for token choice.
        auxiliary_G: Cross entropy of the auxiliary routers, summed over tokens and experts, differentiable; None if no
            auxiliary router is trained.
    """

    choices_C: Tensor
    prob_C: Tensor
    tokens_G: Tensor
    log_z_squared_G: Tensor
    entropy_G: Tensor
    dropped_E: Tensor
    choice: ChoiceSums | None = None
    auxiliary_G: Tensor | None = None


class Routing(NamedTuple):
    """Result of a router for T tokens.

    Attributes:
        zero_weight_TF: Routing weight of each zero-computation expert, fp32 with gradient, 0 if not chosen. These experts
            run on the token's own rank and are never pairs. None if no group has them.
        prob_AC: Softmax of the probe tokens over the columns of their group, 0 in other columns; fp32 with gradient. None
            without probe tokens.
    """

    assignments: Assignments
    sums: RouterSums
    zero_weight_TF: Tensor | None = None
    prob_AC: Tensor | None = None


class DepthSums(NamedTuple):
    """Sums over this rank's tokens in a mixture-of-depths layer (`moe_dist.model.mixture_of_depths`).

    Attributes:
        tokens: int64, number of this rank's tokens that are not padding.
        taken: int64, number of tokens that the layer computes.
        agreed: int64, number of tokens for which evaluation's causal decision equals the selection.
        cut: float64, lowest selected score in the selection scope, times `tokens`.
        weight: float64, sum of the weights of the computed tokens, without gradient.
        auxiliary: Binary cross entropy of the auxiliary router, summed over `tokens`, differentiable; None without that
            router.
    """

    tokens: Tensor
    taken: Tensor
    agreed: Tensor
    cut: Tensor
    weight: Tensor
    auxiliary: Tensor | None


class LayerReport(NamedTuple):
    """The report that an MoE layer returns beside its output. As a NamedTuple, it shows its tensors to FSDP2's hooks.

    Attributes:
        sums: Sums of the router over this rank's tokens.
        rows_remote: Rows that this rank sent to other ranks in forward, one for each distinct (token, other rank).
        pairs: (token, expert) pairs that this rank's tokens take.
        pairs_remote: Pairs whose expert is on another rank.
        depth: Sums of a mixture-of-depths layer; None in other layers.
        members_G: int64, in a mixture-of-depths layer the tokens of each group, skipped tokens included.
        prob_AC: See `Routing`.
    """

    sums: RouterSums
    rows_remote: int
    pairs: int
    pairs_remote: int
    depth: DepthSums | None = None
    members_G: Tensor | None = None
    prob_AC: Tensor | None = None


@dataclass(frozen=True)
class GlobalBatchInfo:
    """Token counts of a training micro-batch on all ranks, known on the host before any layer runs.

    Attributes:
        step: Optimizer step, 0-based; part of the names of random draws.
        first_token: Number of the micro-batch's first token among all tokens of the step.
        rank: Global rank of this process.
        tokens_W: T of each rank of the world.
        members_WG: Number of tokens of each group on each rank of the world, without padding.
    """

    step: int
    first_token: int
    rank: int
    tokens_W: tuple[int, ...]
    members_WG: tuple[tuple[int, ...], ...]

    def first_token_of(self, rank: int) -> int:
        """Number of a rank's first token among all tokens of the step. Each token has the same number in any layout."""
        return self.first_token + sum(self.tokens_W[:rank])


@dataclass(frozen=True)
class RoutingRequest:
    """Input of all routers and MoE layers beside the tokens.

    Attributes:
        batch_info: Numbers of the micro-batch on all ranks; None in evaluation.
        probe_tokens_A: int64, tokens whose softmax the reports return as `prob_AC`; None for no tokens.
        experts_off: If true, routed experts add nothing. All else, collectives included, is computed as usual.
    """

    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None
    experts_off: bool = False


NO_REQUEST = RoutingRequest()


class ExpertsChoice(NamedTuple):
    """The tokens that experts (expert choice) or a layer (mixture of depths) take, without gradient. Kept for recompute.

    Attributes:
        taken_TE: bool, true if the expert takes this rank's token.
        order_TE: int64, this rank's tokens by falling logit of each expert; None if the scope has several ranks.
        kth_score_E: The lowest taken score of each expert in the scope, without noise; 0 if it takes no token, or if its
            capacity takes all tokens of its group.
    """

    taken_TE: Tensor
    order_TE: Tensor | None
    kth_score_E: Tensor


@dataclass
class RoutingCache:
    """The discrete decisions of one layer's forward, and the request. The first forward fills the cache, and the recomputed
    forward reads it. A recomputation's bits may differ, and a changed choice would change split sizes on only one rank.
    """

    choice_TK: Tensor | None = None  # chosen columns of token choice
    dropped_TK: Tensor | None = None
    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None
    choice: ExpertsChoice | None = None  # taken tokens of expert choice
    plan: Any = None  # the dispatcher's plan


def group_columns(groups: Sequence[ExpertGroup]) -> list[int]:
    """Group of each choice column. Columns are all true experts, then all null, identity and constant experts, each in
    group order. True columns come first, so that a stable sort lets ties go to true experts."""
    kinds = zip(*((g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in groups), strict=True)
    return [group for counts in kinds for group, count in enumerate(counts) for _ in range(count)]
