"""Defines the records that router, dispatcher and training step exchange: assignments, reports, requests. The counts are in
`counts.py`.

Shape letters: T tokens on this rank, E true experts (logical, over all groups), K choices per token, N (token, expert)
pairs, G expert groups, W ranks, A probe tokens (whose probabilities are reported), F zero-computation columns (identity and
constant experts), C choice columns: the E true experts, then all groups' null, identity and constant experts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from moe_dist.moe.routing.counts import AuxSums, RoutingCounts, SentCounts
from moe_dist.placement.placement import ExpertGroup

Recompute = Literal["none", "experts", "block"]  # the part of a layer whose forward runs again in backward
ABSENT = -1  # expert id of an absent pair, as in DeepEP


class Assignments(NamedTuple):
    """The (token, expert) pairs of one layer on this rank. This is the only result of the router that the dispatcher reads.

    The number of pairs N does not depend on the routing (N = T x K for token choice), so the host knows all shapes without
    a sync. A pair that no expert computes (a null choice, or a choice of padding) therefore stays in the list as an absent
    pair. All other pairs are called taken. No taken pair occurs twice.

    Attributes:
        token_N: int64, token of each pair.
        expert_N: int64, logical expert of each pair; ABSENT for absent pairs.
        weight_N: Routing weight with gradient, fp32 (float64 in a float64 model); 0 for absent pairs.
        counts_WE: Number of pairs between each EP rank's tokens and each logical expert; the same table on all ranks. None
            if these numbers depend on the routing, as in token choice. In expert choice within one rank they do not depend
            on it, every pair is taken, and pairs are sorted by expert.
        num_choices: K, if every token has K pairs and pairs are sorted by token, as in token choice; else None.
    """

    token_N: Tensor
    expert_N: Tensor
    weight_N: Tensor
    counts_WE: tuple[tuple[int, ...], ...] | None = None
    num_choices: int | None = None

    def taken(self) -> "Assignments":
        """Returns only the taken pairs, for tests and pictures. Syncs on CUDA to read the number of taken pairs."""
        keep = self.expert_N != ABSENT
        return Assignments(self.token_N[keep], self.expert_N[keep], self.weight_N[keep])


class ChosenColumns(NamedTuple):
    """The choices of T tokens, for a trace (`moe_dist.monitor.trace`).

    Attributes:
        column_TK: int16, chosen columns, the best first. -1 means no choice, and -2 - c means a dropped pair of column c.
        weight_TK: float16, routing weight; 0 for null experts and dropped pairs.
    """

    column_TK: Tensor
    weight_TK: Tensor


class Routing(NamedTuple):
    """The result of a router for T tokens.

    Attributes:
        counts, aux: Counts and sums over the T tokens, of one layer.
        zero_weight_TF: Routing weight of each zero-computation expert, fp32 with gradient, 0 if not chosen.
            These experts run on the token's rank, so no (token, expert) pair contains them. None if no group has any.
        prob_AC: Probabilities of the probe tokens, fp32 with gradient, or None. 0 in columns of other groups.
        chosen: Each token's choices, if the request asks for them.
        logits_TC: Logits with gradient; None unless the next layer's router adds them to its own logits.
    """

    assignments: Assignments
    counts: RoutingCounts[Tensor]
    aux: AuxSums
    zero_weight_TF: Tensor | None = None
    prob_AC: Tensor | None = None
    chosen: ChosenColumns | None = None
    logits_TC: Tensor | None = None


class LayerReport(NamedTuple):
    """The report that an MoE layer returns besides its output. It is a NamedTuple so that FSDP2's hooks find its tensors.

    Attributes:
        counts, aux: Counts and sums of the router and of mixture of depths over this rank's tokens.
        sent: The numbers of sent rows and pairs; int64 [5] in the order of `SentCounts` if the device has them.
        prob_AC, chosen: See `Routing`.
        late_TD: Output [T, D] that is added after the next layer. None without a shortcut and in final reports.
        logits_TC: See `Routing`; None in the transformer's reports.
    """

    counts: RoutingCounts[Tensor]
    aux: AuxSums
    sent: SentCounts | Tensor
    prob_AC: Tensor | None = None
    chosen: ChosenColumns | None = None
    logits_TC: Tensor | None = None
    late_TD: Tensor | None = None


@dataclass(frozen=True)
class GlobalBatchInfo:
    """Token counts of a training micro-batch on all ranks. They are in host memory before any layer runs.

    Attributes:
        step: Index of the optimizer step, counted from 0. Random draws and the schedule of capacities depend on it.
        first_token: Index of the micro-batch's first token among all tokens of the step.
        rank: Global rank of this process. In all fields, ranks that share the same sequences count as one rank.
        tokens_W: Number of tokens of each rank of the world, padding included.
        members_WG: Number of tokens of each group on each rank of the world, without padding.
    """

    step: int
    first_token: int
    rank: int
    tokens_W: tuple[int, ...]
    members_WG: tuple[tuple[int, ...], ...]

    @classmethod
    def of_step(cls, step: int, rank: int, lengths_I: Sequence[int], counts_RIG: np.ndarray) -> "Iterator[GlobalBatchInfo]":
        """Yields the counts of each micro-batch i of a step.

        Args:
            lengths_I: Number of tokens of the micro-batch on each rank, padding included.
            counts_RIG: int64, number of tokens of each rank, micro-batch and group, without padding.
        """
        first, ranks = 0, len(counts_RIG)
        for i, length in enumerate(lengths_I):
            members_WG = tuple(tuple(row) for row in counts_RIG[:, i].tolist())
            yield cls(step=step, first_token=first, rank=rank, tokens_W=(length,) * ranks, members_WG=members_WG)
            first += length * ranks

    def first_token_of(self, rank: int) -> int:
        """Returns the index of a rank's first token in the step, which does not depend on the layout of ranks."""
        return self.first_token + sum(self.tokens_W[:rank])


@dataclass(frozen=True)
class RoutingRequest:
    """The inputs, besides the tokens, that all routers and MoE layers of one forward get.

    Attributes:
        batch_info: Token counts of the micro-batch on all ranks; None in evaluation.
        probe_tokens_A: int64, indices of the probe tokens, whose probabilities the reports contain as `prob_AC`; or None.
        token_T: int64, index of each token in its micro-batch; None if token i has index i.
        id_T: int64, id of each token in the vocabulary. The transformer sets it.
        experts_off: If true, routed experts add 0 to the output. The routed experts and their collectives still run.
        keep_choices: If true, the reports contain each token's choices as `chosen`.
        on_reports: A function that the transformer calls once, before the output layer, with the reports of all MoE layers.
            Training's function starts the all-reduce of the routing counts.
        previous_TC: `LayerReport.logits_TC` of the previous MoE layer. The transformer sets it for each layer.
    """

    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None
    token_T: Tensor | None = None
    id_T: Tensor | None = None
    experts_off: bool = False
    keep_choices: bool = False
    on_reports: "Callable[[Sequence[LayerReport]], None] | None" = None
    previous_TC: Tensor | None = None


NO_REQUEST = RoutingRequest()


class ExpertsChoice(NamedTuple):
    """The tokens that each expert takes (expert choice), or that the layer takes (mixture of depths). Has no gradient.
    Recomputation in backward reuses this choice.

    Attributes:
        taken_TE: bool, true if the expert takes this rank's token.
        order_TE: int64, for each expert this rank's tokens in order of falling logit; None if the scope has several ranks.
        kth_score_E: For each expert that takes k tokens, the k-th largest score without noise in the selection scope. 0 if
            the expert takes no token, or if its capacity admits all tokens of its group.
    """

    taken_TE: Tensor
    order_TE: Tensor | None
    kth_score_E: Tensor


@dataclass
class RoutingCache:
    """The discrete decisions of one layer's forward, and the fields of the `RoutingRequest`. The first forward writes the
    decisions, and the recomputed forward reads them. The recomputed forward must not choose again, because recomputed
    logits may differ in the last bits. A different choice would change the number of rows that this rank sends.

    Attributes:
        choice_TK: The columns that each token chose, under token choice.
        kept_TK: bool, true for the chosen columns that the token takes; only in adaptive routers.
        number_T: Predicted number of choices of each token, with gradient. Each forward computes it again.
        previous_TC: `RoutingRequest.previous_TC`.
        logits_TC: The router's logits, with gradient. None except while the router runs.
        choice: The tokens that experts take, in expert choice.
    """

    choice_TK: Tensor | None = None
    kept_TK: Tensor | None = None
    number_T: Tensor | None = None
    previous_TC: Tensor | None = None
    logits_TC: Tensor | None = None
    dropped_TK: Tensor | None = None
    batch_info: GlobalBatchInfo | None = None
    probe_tokens_A: Tensor | None = None
    token_T: Tensor | None = None
    id_T: Tensor | None = None
    keep_choices: bool = False
    choice: ExpertsChoice | None = None
    plan: Any = None  # the dispatcher's plan


def group_columns(groups: Sequence[ExpertGroup]) -> list[int]:
    """Returns the index of each choice column's group. The columns are all true experts, then all null, all identity and
    all constant experts. Each kind is sorted by group. True experts come first, so that they win ties in a stable sort."""
    kinds = zip(*((g.num_experts, g.num_null, g.num_identity, g.num_constant) for g in groups), strict=True)
    return [group for counts in kinds for group, count in enumerate(counts) for _ in range(count)]
