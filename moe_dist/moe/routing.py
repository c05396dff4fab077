"""The types between router, dispatcher and training step: assignments, sums, reports.

Shape letters: T tokens on this rank, D hidden size, E true experts (logical, over all groups), K choices a token,
N (token, expert) pairs, G groups, W ranks, A probe tokens, F zero-computation columns (identity
and constant experts), C choice columns: the E true experts, then each group's null experts, each group's identity experts,
each group's constant experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from moe_dist.placement.placement import ExpertGroup

ABSENT = -1  # expert id of a pair that is not taken, as in DeepEP


class Assignments(NamedTuple):
    """The (token, expert) pairs that are taken: all the dispatcher ever sees.

    N is static (T x K for token choice), so that nothing before the dispatcher's host sync has a data-dependent shape.
    Taken pairs are unique.

    Attributes:
        token_N: int64, the pair's token.
        expert_N: int64, the pair's logical expert, ABSENT where no pair is taken (a null choice, padding).
        weight_N: Routing weight with gradient, fp32 (float64 in a float64 model); 0 where absent.
        counts_WE: Where they are known without reading the routing: for each rank of the EP group its pairs of each logical
            expert. Then every pair is taken, and this rank's are sorted by expert: per-rank expert choice with a capacity
            makes them so. Every rank gives the same numbers. None for token choice.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    counts_WE: tuple[tuple[int, ...], ...] | None = None

    def taken(self) -> "Assignments":
        """The compact list. Its length depends on the data (a host sync on CUDA): for tests and pictures only."""
        keep = self.expert_N != ABSENT
        return Assignments(self.token_N[keep], self.expert_N[keep], self.weight_N[keep])


class ChoiceSums(NamedTuple):
    """Further counts of expert choice, without gradient: local sums of one layer, float64.

    Attributes:
        kth_score_E: The k-th largest score of each expert in its selection scope, times this rank's tokens of its group.
        above_E: This rank's tokens whose score lies above the expert's threshold.
        unrouted_G: Tokens that no expert takes.
    """

    kth_score_E: Tensor
    above_E: Tensor
    unrouted_G: Tensor


class RouterSums(NamedTuple):
    """Local sums over this rank's routed tokens: for balance losses and monitoring.

    Attributes:
        choices_C: int64, how often each column was chosen, before any capacity.
        prob_C: Sum of the group's softmax probabilities, differentiable.
        tokens_G: int64, tokens routed in each group.
        log_z_squared_G: Sum of squared log-sum-exp of the group's logits, differentiable.
        entropy_G: Sum of the softmax's entropy in nats, without gradient.
        dropped_E: int64, choices of each true expert that a capacity dropped.
        choice: Of routers whose experts choose their tokens.
        auxiliary_G: Sum over tokens and experts of the auxiliary routers' cross entropy, differentiable, while they are
            trained.
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
        assignments: The pairs, for the dispatcher.
        sums: Local sums, for losses and monitoring.
        zero_weight_TF: Routing weight of each zero-computation expert, fp32 with gradient, 0 where it was not chosen:
            evaluated where the token is, never a pair. None where no group has zero-computation experts.
        prob_AC: The softmax of the probe tokens (`RoutingCache.probe_tokens_A`) over all columns of their group, 0 in
            the others; fp32 with gradient. None where none was.
    """

    assignments: Assignments
    sums: RouterSums
    zero_weight_TF: Tensor | None = None
    prob_AC: Tensor | None = None


class DepthSums(NamedTuple):
    """Local sums of a block that computes a share of the tokens (`moe_dist.model.mixture_of_depths`).

    Attributes:
        tokens: int64, tokens of this rank that are not padding.
        taken: int64, those that the block computes.
        agreed: int64, those on which the causal decision of evaluation and the choice agree.
        cut: float64, score of the last token that the selection scope takes, times `tokens`.
        weight: float64, sum of the weights of those that are taken, without gradient.
        auxiliary: Binary cross entropy of the auxiliary router, summed over `tokens`, differentiable; None without one.
    """

    tokens: Tensor
    taken: Tensor
    agreed: Tensor
    cut: Tensor
    weight: Tensor
    auxiliary: Tensor | None


class LayerReport(NamedTuple):
    """Report of an MoE layer beside its output, by value; a NamedTuple, so that FSDP2's hooks see its tensors.

    Attributes:
        sums: The router's local sums.
        rows_remote: Distinct (token, other rank) rows this rank sent forward.
        pairs: (token, expert) pairs this rank's tokens took.
        pairs_remote: Those whose expert lives on another rank.
        depth: Sums of the whole block, where it computes a share of the tokens.
        members_G: int64, of such a block: this rank's tokens of each group, skipped tokens among them.
        prob_AC: As in `Routing`.
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
    """A training micro-batch on all ranks as known before any layer runs: plain numbers on the host.

    Attributes:
        step: Optimizer step, 0-based; names the step's random draws.
        first_token: Number of the micro-batch's first token among all tokens of the step.
        rank: This rank's place in the world.
        tokens_W: For each rank of the world its T.
        members_WG: For each rank of the world its tokens of each group, padding left out.
    """

    step: int
    first_token: int
    rank: int
    tokens_W: tuple[int, ...]
    members_WG: tuple[tuple[int, ...], ...]

    def first_token_of(self, rank: int) -> int:
        """Number of a rank's first token among all tokens of the step: the same however they are spread over ranks."""
        return self.first_token + sum(self.tokens_W[:rank])


@dataclass(frozen=True)
class RoutingRequest:
    """Options of a forward for the MoE layers, beside the tokens.

    Attributes:
        batch_info: For routers that need to know the micro-batch on all ranks; None in evaluation.
        probe_tokens_A: int64, tokens whose routing softmax the reports are to have (`prob_AC`); None for none.
        experts_off: Ablation: the routed experts add nothing, and all else, collectives included, is computed as usual.
    """

    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None
    experts_off: bool = False


NO_REQUEST = RoutingRequest()


class ExpertsChoice(NamedTuple):
    """The tokens that experts, or a layer, take. Without gradient; kept under recompute.

    Attributes:
        taken_TE: bool, which of this rank's tokens each expert takes.
        order_TE: int64, this rank's tokens by falling logit of each expert; only where the scope is one rank.
        kth_score_E: Score of the last token that an expert takes (the k-th largest of the scope, noise left out); 0 where
            it takes none, and for an expert that takes all tokens of its group by its capacity.
    """

    taken_TE: Tensor
    order_TE: Tensor | None
    kth_score_E: Tensor


@dataclass
class RoutingCache:
    """The discrete decisions of one layer's forward, kept for its recomputation, and the inputs of the routing.

    Under recompute the routing is saved, never recomputed: bits of a second forward may differ, and another choice would
    change split sizes on one rank alone. Filled by the first forward, read by the second.
    """

    choice_TK: Tensor | None = None
    dropped_TK: Tensor | None = None
    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None  # int64, tokens whose softmax the caller wants
    choice: ExpertsChoice | None = None
    plan: Any = None


def group_columns(groups: Sequence[ExpertGroup]) -> list[int]:
    """For each choice column its group: all true experts, then all null, all identity and all constant ones, each in group
    order.

    True columns come first so that a stable sort lets ties go to true experts.
    """
    kinds = (
        [group.num_experts for group in groups],
        [group.num_null for group in groups],
        [group.num_identity for group in groups],
        [group.num_constant for group in groups],
    )
    return [group for counts in kinds for group, count in enumerate(counts) for _ in range(count)]
