"""The tokens that compete for an expert's room, and which of them it takes. No shape depends on data; no host sync.

    rank        those of one rank's micro-batch; no collective
    ep_group    those of all ranks of an EP group
    world       those of all ranks

The larger sets exchange logits: one all-gather a layer and forward pass, called `choice logits`, issued by every rank of
the set whatever its tokens, and not repeated by recomputation. Each rank sends T x E numbers of the router's dtype (fp32)
to each of the S - 1 others: (S - 1) x T x E x 4 bytes out, as many in. All ranks then choose alike, from the same bits.

Shape letters: T tokens on this rank, S ranks of the set, U tokens of the set in rank order, E experts, G groups, W ranks.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker, track_collective
from moe_dist.moe.dispatch.rows import counting_order
from moe_dist.moe.routing import ABSENT, Assignments, ExpertsChoice, GlobalBatchInfo

ScopeKind = Literal["rank", "ep_group", "world"]
OUTSIDE = float("-inf")  # logit of an expert that is not of the token's group


@dataclass(frozen=True)
class ScopeRanks:
    """The ranks over which experts may choose, as seen from one of them: process groups and places in the world."""

    world: dist.ProcessGroup | None = None
    world_size: int = 1
    rank: int = 0
    ep: dist.ProcessGroup | None = None
    ep_ranks: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class SelectionScope:
    """Over which ranks experts choose, as plain values.

    Attributes:
        kind: See the module.
        group: Process group of the set's ranks; None where that is one rank.
        ranks: The set's ranks in the world, in the group's order; this rank's place among them is `own`.
        ep_ranks: This rank's EP group likewise, for counts that the dispatcher is told beforehand.
        comm_stats, tracker: Where the collective is counted and noted.
    """

    kind: ScopeKind = "rank"
    group: dist.ProcessGroup | None = None
    ranks: tuple[int, ...] = (0,)
    own: int = 0
    ep_ranks: tuple[int, ...] = (0,)
    comm_stats: CommStats | None = None
    tracker: CollectiveTracker | None = None

    @classmethod
    def over(
        cls, kind: ScopeKind, where: ScopeRanks, *, comm_stats: CommStats | None, tracker: CollectiveTracker | None
    ) -> "SelectionScope":
        """The set of a kind; without a group where it has but one rank."""
        ranks = {"rank": (where.rank,), "ep_group": where.ep_ranks, "world": tuple(range(where.world_size))}[kind]
        group = {"rank": None, "ep_group": where.ep, "world": where.world}[kind]
        return cls(
            kind=kind,
            group=group if len(ranks) > 1 else None,
            ranks=ranks,
            own=ranks.index(where.rank),
            ep_ranks=where.ep_ranks,
            comm_stats=comm_stats,
            tracker=tracker,
        )

    def lengths(self, num_tokens: int, batch_info: GlobalBatchInfo | None) -> list[int]:
        """T of each rank of the set. Without facts (evaluation) all bring as many as this one."""
        return [num_tokens if batch_info is None else batch_info.tokens_W[rank] for rank in self.ranks]

    def gather(self, logits_TE: Tensor, lengths: Sequence[int], *, layer: str = "") -> Tensor:
        """The logits of the whole set [U, E]; the collective of this module, where the set has several ranks."""
        if self.group is None:
            return logits_TE
        longest = max(lengths)
        padded = logits_TE.new_full((longest, logits_TE.shape[1]), OUTSIDE)
        padded[: logits_TE.shape[0]] = logits_TE
        gathered = padded.new_empty((longest * len(lengths), logits_TE.shape[1]))
        if self.comm_stats is not None:
            self.comm_stats.count("choice logits", (len(lengths) - 1) * padded.nbytes, payload=False)
        with track_collective(self.tracker, "choice logits", device=padded.device, layer=layer):
            dist.all_gather_into_tensor(gathered, padded, group=self.group)
        parts = gathered.split(longest)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def capacity_of_tokens(capacity: float, tokens: int) -> int:
    """ceil(c T), at most T. A product whole but for its last bits (1e-9) is not rounded up."""
    return min(tokens, max(0, math.ceil(capacity * tokens - 1e-9)))


def capacities(capacity_E: Tensor, tokens_E: Tensor) -> Tensor:
    """The same for tensors, as int64; float64 arithmetic on host and device alike, hence the same numbers."""
    wanted_E = torch.ceil(capacity_E * tokens_E.to(torch.float64) - 1e-9).to(torch.int64)
    return torch.minimum(wanted_E.clamp_min(0), tokens_E)


def choose(
    logits_UE: Tensor, noisy_UE: Tensor, capacity_E: Tensor, own: slice, *, keep_order: bool = False
) -> ExpertsChoice:
    """Each expert takes its ceil(c T_group) best tokens by `noisy_UE`; ties go to the earlier token of the set.

    Args:
        logits_UE: Without noise, OUTSIDE where the token is not of the expert's group; sigmoid of it is the score.
        noisy_UE: What is compared: the same, with noise where there is any.
        capacity_E: float64, c of each expert's group.
        own: This rank's rows of the set.
        keep_order: The set is one rank's, and its order is wanted.
    """
    tokens_E = (logits_UE != OUTSIDE).sum(0)
    room_E = capacities(capacity_E, tokens_E)
    order_UE = torch.sort(noisy_UE, dim=0, descending=True, stable=True).indices
    place_U = torch.arange(logits_UE.shape[0], device=logits_UE.device)
    taken_UE = torch.zeros_like(order_UE, dtype=torch.bool).scatter_(0, order_UE, place_U[:, None] < room_E)
    return ExpertsChoice(
        taken_TE=taken_UE[own],
        order_TE=order_UE if keep_order else None,
        kth_score_E=_cut(logits_UE, order_UE if noisy_UE is logits_UE else None, room_E, capacity_E),
    )


def _cut(logits_UE: Tensor, order_UE: Tensor | None, room_E: Tensor, capacity_E: Tensor) -> Tensor:
    if not logits_UE.shape[0]:
        return logits_UE.new_zeros(logits_UE.shape[1])
    last_1E = (room_E - 1).clamp_min(0)[None]
    if order_UE is None:
        order_UE = torch.sort(logits_UE, dim=0, descending=True).indices
    kth_score_E = torch.gather(logits_UE, 0, torch.gather(order_UE, 0, last_1E))[0].sigmoid()
    return torch.where((room_E > 0) & (capacity_E < 1.0), kth_score_E, 0.0)


def counted_pairs(
    choice: ExpertsChoice, weight_TE: Tensor, capacity_E: Sequence[float], group_of_E: Sequence[int], batch_info: GlobalBatchInfo,
    ep_ranks: Sequence[int],
) -> Assignments:  # fmt: skip
    """The pairs by expert and falling logit, their number known beforehand on all ranks: N is the sum of capacities."""
    assert choice.order_TE is not None, "only a choice among one rank's tokens is of a number that is known beforehand"
    counts_WE = tuple(
        tuple(
            capacity_of_tokens(capacity, batch_info.members_WG[rank][group])
            for capacity, group in zip(capacity_E, group_of_E, strict=True)
        )
        for rank in ep_ranks
    )
    mine = counts_WE[list(ep_ranks).index(batch_info.rank)]
    token_N = torch.cat([choice.order_TE[:count, expert] for expert, count in enumerate(mine)])
    expert_N = torch.cat(
        [torch.full((count,), expert, dtype=torch.int64, device=token_N.device) for expert, count in enumerate(mine)]
    )
    return Assignments(token_N, expert_N, weight_TE[token_N, expert_N], counts_WE)


def by_token(pairs: Assignments, num_tokens: int) -> Assignments:
    """The same pairs in the order of tokens, for dispatchers that find the counts themselves."""
    order_N = counting_order(pairs.token_N, num_tokens)
    return Assignments(pairs.token_N[order_N], pairs.expert_N[order_N], pairs.weight_N[order_N])


def token_pairs(taken_TE: Tensor, weight_TE: Tensor, columns_TK: Tensor) -> Assignments:
    """The pairs by token, K places each: the experts of the token's group, ABSENT where one does not take it.

    N is T x K, K the experts of the largest group: a threshold bounds nobody's load, and a set of several ranks bounds that
    of none of them by much.

    Args:
        columns_TK: int64, the experts of each token's group, ABSENT beyond them and for padding.
    """
    safe_TK = columns_TK.clamp_min(0)
    kept_TK = taken_TE.gather(1, safe_TK) & (columns_TK != ABSENT)
    token_T = torch.arange(taken_TE.shape[0], device=taken_TE.device)
    return Assignments(
        token_N=token_T.repeat_interleave(columns_TK.shape[1]),
        expert_N=torch.where(kept_TK, columns_TK, ABSENT).flatten(),
        weight_N=torch.where(kept_TK, weight_TE.gather(1, safe_TK), 0.0).flatten(),
    )
