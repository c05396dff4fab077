"""Distributes (deals) the sequences of a step over the ranks so that the ranks' expected costs are nearly equal. The deal
depends only on the batch, so every rank, also of a resumed run, computes the same deal without an exchange. Shape letters:
Q sequences of a step, I micro-batches, W ranks, B sequences in a micro-batch of a rank, P parts, N items of a part, S
tokens of a sequence, M modalities.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class SequenceCosts:
    """Estimates the cost of sequences, in FLOPs of the forward pass.

    Attributes:
        document_S: float64 [S + 1], maps a document's length to its cost without experts. This is the cost of its tokens
            and of its attention, which without a window grows with the square of the length. Padding counts as a document.
        expert_M: float64, maps a modality to a token's mean cost in true experts. A null expert costs nothing.
        patch, pair: Cost in an encoder of a picture's patch, and of the attention of a patch to another.
    """

    document_S: np.ndarray
    expert_M: np.ndarray
    patch: float = 0.0
    pair: float = 0.0

    def of(self, lengths: Sequence[int], tokens_M: np.ndarray, patches: Sequence[int] = ()) -> tuple[float, float]:
        """Returns a sequence's cost without experts, which only the sequence's rank computes, and the sequence's cost of
        experts.

        Args:
            lengths: Number of tokens of each document of the sequence.
            tokens_M: Number of tokens of each modality in the sequence, without padding.
            patches: Number of patches of each picture of the sequence.
        """
        padding = len(self.document_S) - 1 - sum(lengths)
        encoder = sum(self.patch * count + self.pair * count**2 for count in patches)
        return float(self.document_S[[*lengths, padding]].sum() + encoder), float(tokens_M @ self.expert_M)


class Dealing(NamedTuple):
    """The settings with which a run deals its sequences. `ep` and `mix` are arguments of `deal`."""

    costs: SequenceCosts
    ep: int
    mix: bool


class Deal(NamedTuple):
    """The result of dealing the sequences of a step to the ranks.

    Attributes:
        place_IWB: int64, indices in the step of the sequences that each rank has in each micro-batch.
        undealt, dealt: Ratio (cost of the busiest rank) / (mean cost of a rank), for the stream's order and for this deal.
            Costs are summed over micro-batches, because in each of them all ranks wait for the busiest rank.
    """

    place_IWB: np.ndarray
    undealt: float
    dealt: float


def deal(cost_Q2: np.ndarray, *, micro_batches: int, ranks: int, ep: int, mix: bool) -> Deal:
    """Deals the sequences of a step to the ranks. All ranks get equally many sequences. If no deal lowers the cost of the
    busiest ranks, keeps the order of the stream.

    Args:
        cost_Q2: Result of `SequenceCosts.of` for each sequence, in the order of the stream.
        ep: Number of ranks in an EP group. These consecutive ranks share the experts' cost of all their sequences.
        mix: True if a sequence may move to another micro-batch. Sequences of similar cost can then be in one micro-batch.
    """
    place_IK = np.arange(len(cost_Q2)).reshape(micro_batches, -1)
    place_IWB = place_IK.reshape(micro_batches, ranks, -1)
    undealt = _busiest_over_mean(cost_Q2[place_IWB], ep)
    if mix:
        place_IK = _alike(_alone(cost_Q2, ep), micro_batches, ranks)
    dealt_IWB = np.stack([_among_ranks(cost_Q2, place_K, ranks, ep) for place_K in place_IK])
    dealt = _busiest_over_mean(cost_Q2[dealt_IWB], ep)
    return Deal(dealt_IWB, undealt, dealt) if dealt < undealt else Deal(place_IWB, undealt, undealt)


def equal_parts(cost_X: np.ndarray, parts: int) -> np.ndarray:
    """Divides items into `parts` parts of equal size and nearly equal cost. Returns the items of each part, int64 [P, N].

    Uses the balanced largest differencing method (Yakir 1996). The sorted items are cut into rows with one item for each
    part. Then the two rows with the largest differences between their parts' sums are joined, until one row is left. In a
    join, the part with the largest sum in one row joins the part with the smallest sum in the other row, and so on.
    """
    rows = []
    for number, item_P in enumerate(np.argsort(-cost_X, kind="stable").reshape(-1, parts)):
        rows.append((cost_X[item_P[-1]] - cost_X[item_P[0]], number, cost_X[item_P], item_P[:, None]))
    heapq.heapify(rows)  # the row with the largest difference is first; ties: lowest number first
    while len(rows) > 1:
        _, number, cost_P, item_PN = heapq.heappop(rows)
        _, _, other_P, other_PN = heapq.heappop(rows)
        cost_P, item_PN = cost_P + other_P[::-1], np.concatenate([item_PN, other_PN[::-1]], axis=1)
        order_P = np.argsort(-cost_P, kind="stable")
        cost_P, item_PN = cost_P[order_P], item_PN[order_P]
        heapq.heappush(rows, (cost_P[-1] - cost_P[0], number, cost_P, item_PN))
    return rows[0][-1]


def _alone(cost_Q2: np.ndarray, ep: int) -> np.ndarray:
    """Returns the part of each sequence's cost that its rank computes alone. It includes the experts' cost only if ep=1."""
    return cost_Q2.sum(1) if ep == 1 else cost_Q2[:, 0]


def _alike(cost_Q: np.ndarray, micro_batches: int, ranks: int) -> np.ndarray:
    """Returns the sequences of each micro-batch, [I, W B], as B sets of W sequences. The sequences of a set have similar
    costs, and each rank gets one of them. Each micro-batch gets expensive sets and cheap sets."""
    runs = np.argsort(-cost_Q, kind="stable").reshape(-1, micro_batches, ranks)
    runs[1::2] = runs[1::2, ::-1].copy()  # every second run is reversed, so that no micro-batch gets every expensive set
    return runs.transpose(1, 0, 2).reshape(micro_batches, -1)


def _among_ranks(cost_Q2: np.ndarray, place_K: np.ndarray, ranks: int, ep: int) -> np.ndarray:
    """Deals the sequences of a micro-batch. First balances the total costs of EP groups. Then balances, inside a group, the
    costs that each rank has alone. Returns the sequences of each rank, [W, B], sorted within the rank."""
    found = []
    for group_N in equal_parts(cost_Q2[place_K].sum(1), ranks // ep):
        group_N = place_K[group_N]
        found.append(group_N[equal_parts(_alone(cost_Q2[group_N], ep), ep)])
    return np.sort(np.concatenate(found), axis=1)


def _busiest_over_mean(cost_IWB2: np.ndarray, ep: int) -> float:
    own_IW, experts_IW = np.moveaxis(cost_IWB2.sum(2), -1, 0)
    shared_IW = np.repeat(experts_IW.reshape(len(experts_IW), -1, ep).mean(2), ep, axis=1)
    cost_IW = own_IW + shared_IW
    return float(cost_IW.max(1).sum() / cost_IW.mean(1).sum())
