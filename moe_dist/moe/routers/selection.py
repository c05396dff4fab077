"""Lets choosers select tokens. A chooser is an expert (expert choice) or a layer (mixture of depths).

The tokens of one selection scope compete:

    rank        tokens of one rank's micro-batch; no collective
    ep_group    tokens of all ranks of an EP group
    world       tokens of all ranks

In the scopes ep_group and world, each forward of a layer gathers the logits on every rank of the scope by one all-gather.
Recomputation does not repeat the all-gather. Each rank sends T x E fp32 numbers to each of the S - 1 other ranks of the
scope: (S - 1) x T x E x 4 bytes. All ranks of the scope select the same tokens, because the gathered logits are
bit-identical. The selection costs no host sync.

The result of the competition for a token depends on later tokens, so only training selects tokens by competition.
Evaluation decides for each token independently, by a threshold (`thresholds`) or by an `AuxiliaryRouter`.

Shape letters: T tokens on this rank, D hidden size, S ranks of the scope, U tokens of the scope in rank order, E choosers,
G expert groups, W ranks.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from moe_dist.comm.collectives import CommStats, from_host, sum_over
from moe_dist.comm.names import CHOICE_LOGITS
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.moe.kernels.torch_kernels import counting_order
from moe_dist.moe.routing.types import ABSENT, Assignments, ChosenColumns, ExpertsChoice, GlobalBatchInfo
from moe_dist.placement.parameter_names import Role

ScopeKind = Literal["rank", "ep_group", "world"]
Causal = Literal["threshold", "auxiliary"]
KEPT = 16  # number of cached lists of experts
OUTSIDE = float("-inf")  # logit of a token that does not compete: a token of another group, or padding


class AuxiliaryRouter(nn.Module):
    """Learns to predict which tokens E choosers select. It has two linear layers, `inner` [D/2, D] and `outer` [E, D/2]."""

    role = Role.AUXILIARY_ROUTER

    def __init__(self, hidden_dim: int, num_choosers: int) -> None:
        super().__init__()
        inner_dim = max(1, hidden_dim // 2)
        self.inner = nn.Parameter(torch.empty(inner_dim, hidden_dim))
        self.outer = nn.Parameter(torch.empty(num_choosers, inner_dim))

    def forward(self, h_TD: Tensor) -> Tensor:
        """Returns logits [T, E]. A positive logit predicts that the chooser takes the token."""
        return F.linear(F.silu(F.linear(h_TD, self.inner.to(h_TD.dtype))), self.outer.to(h_TD.dtype))


class ThresholdGate(Protocol):
    """A module that has the thresholds of n choosers."""

    def running_mean(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns three writable buffers [n], or views of buffers: thresholds, running means and numbers of steps."""
        ...


class ChoosingRouter(nn.Module, ABC):
    """A router whose E choosers select tokens in training.

    Attributes:
        causal: The rule by which evaluation decides for each token independently.
        noncausal: If true, evaluation selects tokens by competition, as in training, but without noise.
        noncausal_step: The training step, counted from 0, whose scheduled capacities `noncausal` uses.
    """

    causal: Causal | None
    threshold_decay: float
    noncausal = False
    noncausal_step = 0

    @abstractmethod
    def gates(self) -> Sequence[ThresholdGate]:
        """Returns the objects that hold the choosers' thresholds, in order of the choosers."""

    @abstractmethod
    def scores(self, h_TD: Tensor, inside_T: Tensor, /) -> Tensor:
        """Returns each token's score for each chooser [T, E], or 0 if the token does not compete for this chooser."""

    @abstractmethod
    def num_taken(self, found: Any) -> Tensor:
        """Returns the number of tokens that each chooser took [E], from the result of `forward`."""


@contextmanager
def choice_of_training(routers: Sequence[nn.Module], steps: int) -> Iterator[None]:
    """In this context tokens compete in evaluation as they do in training (`ChoosingRouter.noncausal`). `steps` is the
    number of training steps so far. The capacities of the last of these steps apply."""
    mine = [router for router in routers if isinstance(router, ChoosingRouter)]
    for router in mine:
        router.noncausal, router.noncausal_step = True, max(0, steps - 1)
    try:
        yield
    finally:
        for router in mine:
            router.noncausal, router.noncausal_step = False, 0


@dataclass(frozen=True)
class SelectionScope:
    """The ranks whose tokens compete for the choosers.

    Attributes:
        group: Process group of the scope's ranks; None for a single rank.
        ranks: Global ranks of the scope, in the process group's order. Ranks that split the same sequences count as one
            rank, as in `GlobalBatchInfo`. `own` is this rank's index in the list.
        ep_ranks: Global ranks of this rank's EP group, for `Assignments.counts_WE`.
        comm_stats, tracker: `comm_stats` counts the bytes of the all-gather; `tracker` tells the watchdog that it is
            running.
        shares: Process groups of ranks that split the same sequences, so that each has a part of a micro-batch's tokens.
    """

    kind: ScopeKind = "rank"
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    own: int = 0
    ep_ranks: tuple[int, ...] = (0,)
    comm_stats: CommStats | None = None
    tracker: CollectiveTracker | None = None
    shares: tuple[dist.ProcessGroup, ...] = ()

    def lengths(self, num_tokens: int, batch_info: GlobalBatchInfo | None) -> list[int]:
        """Returns the number of tokens of each rank's micro-batch. `num_tokens` is the number on this rank. Without
        `batch_info` (in evaluation and mixture of depths) all ranks have the same number of tokens."""
        own = num_tokens * math.prod(group.size() for group in self.shares)
        lengths = [own if batch_info is None else batch_info.tokens_W[rank] for rank in self.ranks]
        assert lengths[self.own] == own, f"{own} tokens here, {lengths} were announced"
        return lengths

    def choose(
        self,
        logits_TE: Tensor,
        share_E: Tensor,
        lengths: Sequence[int],
        *,
        name: str = CHOICE_LOGITS,
        layer: str = "",
        add_noise: Callable[[Tensor], Tensor] | None = None,
        token_T: Tensor | None = None,
    ) -> ExpertsChoice:
        """Selects the tokens of this rank that each chooser takes. These tokens compete with all tokens of the scope. Costs
        at most one collective, and one more for each process group in `shares`.

        Args:
            logits_TE: Logits without gradient; OUTSIDE for a token that does not compete.
            share_E: float64, fraction of the competing tokens that each chooser takes.
            lengths: Number of tokens T of each rank of the scope.
            name, layer: Names of the collective and of the layer, for statistics and for reports of a hang.
            add_noise: Function that adds noise to the scope's logits [U, E]. The k-th largest scores contain no noise.
            token_T: Index of each of this rank's tokens in its micro-batch; None if this rank has all tokens, in order.
        """
        if token_T is not None:
            local_TE, logits_TE = logits_TE, logits_TE.new_zeros(lengths[self.own], logits_TE.shape[1])
            logits_TE[token_T] = local_TE
            for group in self.shares:  # a token is on one rank; the other ranks add zeros, which change no bit
                sum_over(logits_TE, group, name=name, tracker=self.tracker)
        logits_UE = self._gather(logits_TE, lengths, name=name, layer=layer)
        noisy_UE = logits_UE if add_noise is None else add_noise(logits_UE)
        first = sum(lengths[: self.own])
        mine = slice(first, first + lengths[self.own])
        if token_T is None:
            return choose(logits_UE, noisy_UE, share_E, mine, keep_order=len(lengths) == 1)
        found = choose(logits_UE, noisy_UE, share_E, mine)
        return found._replace(taken_TE=found.taken_TE[token_T])

    def _gather(self, logits_TE: Tensor, lengths: Sequence[int], *, name: str, layer: str) -> Tensor:
        """Returns the logits [U, E] of all tokens of the scope. Costs one all-gather if the scope has several ranks."""
        if self.group is None:
            return logits_TE
        longest = max(lengths)  # all-gather needs equal sizes on all ranks
        padded = logits_TE.new_full((longest, logits_TE.shape[1]), OUTSIDE)
        padded[: logits_TE.shape[0]] = logits_TE
        gathered = padded.new_empty((longest * len(lengths), logits_TE.shape[1]))  # [S T, E] on every rank
        if self.comm_stats is not None:
            self.comm_stats.count(name, (len(lengths) - 1) * padded.nbytes, payload=False)
        with track_collective(self.tracker, name, device=padded.device, layer=layer):
            dist.all_gather_into_tensor(gathered, padded, group=self.group)
        parts = gathered.split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def tokens_of_share(share: float, tokens: int) -> int:
    """Returns ceil(c T), at most T, for the fraction c = `share`. A product at most 1e-9 above an integer rounds down."""
    return min(tokens, max(0, math.ceil(share * tokens - 1e-9)))


def tokens_of_shares(share_E: Tensor, tokens_E: Tensor) -> Tensor:
    """Computes `tokens_of_share` for tensors, int64. The results are equal, because both functions use float64."""
    wanted_E = torch.ceil(share_E * tokens_E.to(torch.float64) - 1e-9).to(torch.int64)
    return torch.minimum(wanted_E.clamp_min(0), tokens_E)


def choose(logits_UE: Tensor, noisy_UE: Tensor, share_E: Tensor, own: slice, *, keep_order: bool = False) -> ExpertsChoice:
    """Lets each chooser take the best ceil(c T) of T competing tokens. Of equal logits the earlier token wins.

    Args:
        logits_UE: Logits without noise; OUTSIDE for a token that does not compete. A score is the sigmoid of a logit.
        noisy_UE: The logits that choosers compare: `logits_UE` plus noise, or `logits_UE` itself.
        share_E: float64, the fraction c of the competing tokens that each chooser takes.
        own: The rows of this rank's tokens.
        keep_order: If true, `order_TE` is returned, too. `keep_order` needs a scope of one rank.
    """
    room_E = tokens_of_shares(share_E, (logits_UE != OUTSIDE).sum(0))
    order_UE = torch.sort(noisy_UE, dim=0, descending=True, stable=True).indices  # int64 [U, E]
    place_U = torch.arange(logits_UE.shape[0], device=logits_UE.device)
    taken_UE = torch.zeros_like(order_UE, dtype=torch.bool).scatter_(0, order_UE, place_U[:, None] < room_E)
    kth_score_E = _kth_score(logits_UE, order_UE if noisy_UE is logits_UE else None, room_E)
    return ExpertsChoice(taken_UE[own], order_UE if keep_order else None, kth_score_E)


def _kth_score(logits_UE: Tensor, order_UE: Tensor | None, room_E: Tensor) -> Tensor:
    """Returns each chooser's k-th largest score without noise, where k is `room_E`; 0 if k is 0. `order_UE` is the
    descending order of `logits_UE`, or None."""
    if not logits_UE.shape[0]:
        return logits_UE.new_zeros(logits_UE.shape[1])
    if order_UE is None:  # with noise, a second sort is needed for the k-th largest score
        order_UE = torch.sort(logits_UE, dim=0, descending=True).indices
    last_1E = (room_E - 1).clamp_min(0)[None]
    kth_score_E = torch.gather(logits_UE, 0, torch.gather(order_UE, 0, last_1E))[0].sigmoid()
    return torch.where(room_E > 0, kth_score_E, 0.0)


def counted_pairs(
    choice: ExpertsChoice,
    weight_TE: Tensor,
    share_E: Sequence[float],
    group_of_E: Sequence[int],
    batch_info: GlobalBatchInfo,
    ep_ranks: Sequence[int],
) -> Assignments:
    """Returns the pairs sorted by expert and falling logit. All ranks know the number of pairs N, because it depends only
    on the capacities and on numbers of tokens."""
    assert choice.order_TE is not None, "the number of pairs is known beforehand only if the scope is one rank"
    counts_WE = tuple(
        tuple(
            tokens_of_share(capacity, batch_info.members_WG[rank][group])
            for capacity, group in zip(share_E, group_of_E, strict=True)
        )
        for rank in ep_ranks
    )
    mine = counts_WE[list(ep_ranks).index(batch_info.rank)]
    token_N = torch.cat([choice.order_TE[:count, expert] for expert, count in enumerate(mine)])  # counts on the host
    expert_N = _expert_of_pairs(mine, token_N.device)
    cell_N = torch.add(expert_N, token_N, alpha=weight_TE.shape[1])
    # index_select instead of weight_TE[token_N, expert_N], whose backward sorts the pairs on CUDA.
    return Assignments(token_N, expert_N, weight_TE.flatten().index_select(0, cell_N), counts_WE)


@lru_cache(maxsize=KEPT)
def _expert_of_pairs(counts_E: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns each pair's expert, int64 [N], from each expert's number of pairs. The layers of a micro-batch share it."""
    return from_host(np.repeat(np.arange(len(counts_E)), counts_E), torch.int64, device)


def by_token(pairs: Assignments, num_tokens: int) -> Assignments:
    """Returns the pairs of `counted_pairs` sorted by token, without `counts_WE`, for dispatchers that count pairs."""
    order_N = counting_order(pairs.token_N, num_tokens)
    # index_select for the weights, because the backward of an index sorts on CUDA
    return Assignments(pairs.token_N[order_N], pairs.expert_N[order_N], pairs.weight_N.index_select(0, order_N))


def token_pairs(taken_TE: Tensor, weight_TE: Tensor, columns_TK: Tensor) -> Assignments:
    """Returns T x K (token, expert) pairs sorted by token: one pair for each of the K experts of the token's group. The
    pair of an expert that does not take the token is absent.

    K is the number of experts of the largest group. All T x K pairs may be needed: a threshold does not limit an expert's
    number of tokens, and a scope of several ranks does not limit the number from one rank. `columns_TK` has the experts of
    each token's group, int64, then ABSENT up to K; padding has only ABSENT."""
    safe_TK = columns_TK.clamp_min(0)
    kept_TK = taken_TE.gather(1, safe_TK) & (columns_TK != ABSENT)
    token_T = torch.arange(taken_TE.shape[0], device=taken_TE.device)
    return Assignments(
        token_N=token_T.repeat_interleave(columns_TK.shape[1]),
        expert_N=torch.where(kept_TK, columns_TK, ABSENT).flatten(),
        weight_N=torch.where(kept_TK, weight_TE.gather(1, safe_TK), 0.0).flatten(),
    )


@torch.no_grad()
def recorded(taken_TE: Tensor, weight_TE: Tensor, columns_TK: Tensor) -> ChosenColumns:
    """Returns the experts that take each token, for a trace: at most K experts, by falling weight, then ABSENT.
    `token_pairs` describes the arguments. Costs a sort."""
    pairs = token_pairs(taken_TE, weight_TE, columns_TK)
    expert_TK, weight_TK = pairs.expert_N.view_as(columns_TK), pairs.weight_N.view_as(columns_TK)
    order_TK = torch.where(expert_TK == ABSENT, -1.0, weight_TK).argsort(dim=1, descending=True, stable=True)
    return ChosenColumns(expert_TK.gather(1, order_TK).to(torch.int16), weight_TK.gather(1, order_TK).to(torch.float16))
