"""Computes the numbers of a report. All functions are pure.

Shape letters: L MoE layers, T tokens, K choices of a token, n true experts of a group, E true experts of all groups, R
ranks of an EP group, V token ids, X any number of rows.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from moe_dist.monitor.metrics import divide
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement


def lorenz(load_Xn: np.ndarray) -> np.ndarray:
    """Returns the fraction of the load that goes to the p least loaded experts, for p = 0 ... n, float64 [X, n + 1] (Lorenz
    1905). Rows without load are nan."""
    rising_Xn = np.sort(load_Xn, axis=1).cumsum(1)
    return np.pad(divide(rising_Xn, rising_Xn[:, -1:]), ((0, 0), (1, 0)))


def gini(load_Xn: np.ndarray) -> np.ndarray:
    """Returns the Gini coefficient of each row (Gini 1912). It is 0 if all experts have the same load, and 1 - 1/n if one
    expert has all load. It is the area between diagonal and Lorenz curve, divided by the area below the diagonal."""
    curve = lorenz(load_Xn)
    return 1 - (curve[:, 1:] + curve[:, :-1]).sum(1) / load_Xn.shape[1]


def distance(first_XC: np.ndarray, second_XC: np.ndarray) -> np.ndarray:
    """Returns the total variation distance between each row of `first_XC` and the same row of `second_XC`. This is the
    fraction of choices, from 0 to 1, that differ. It is nan without choices."""
    first_share_XC, second_share_XC = (divide(counts, counts.sum(1, keepdims=True)) for counts in (first_XC, second_XC))
    return np.abs(first_share_XC - second_share_XC).sum(1) / 2


def taken(ids_TK: np.ndarray, group: ExpertGroup) -> np.ndarray:
    """Returns whether each token takes each true expert of the group, bool [T, n]. A dropped pair counts as not taken."""
    taken_Tn = np.zeros((len(ids_TK), group.num_experts), bool)
    rows, places = np.nonzero((ids_TK >= group.first_expert) & (ids_TK < group.first_expert + group.num_experts))
    taken_Tn[rows, ids_TK[rows, places] - group.first_expert] = True
    return taken_Tn


def together(taken_Tn: np.ndarray) -> np.ndarray:
    """Returns the lift of each pair of experts, float64 [n, n]. The lift is the number of tokens that take both experts,
    divided by the number expected if tokens chose experts independently. It is nan on the diagonal and for experts without
    tokens."""
    share_n = taken_Tn.mean(0)
    both_nn = taken_Tn.T.astype(np.float32) @ taken_Tn.astype(np.float32) / len(taken_Tn)
    lift_nn = divide(both_nn, np.outer(share_n, share_n))
    np.fill_diagonal(lift_nn, np.nan)
    return lift_nn


class Special(NamedTuple):
    """A token id that characterises an expert, because the expert takes its tokens much more often than those of other ids.

    Attributes:
        times, share: Number and fraction of this id's occurrences that the expert takes.
        lift: `share` divided by the fraction of all tokens that the expert takes.
        row: Index, among all tokens, of the first occurrence that the expert takes.
    """

    token: int
    times: int
    share: float
    lift: float
    row: int


def special_tokens(token_T: np.ndarray, taken_Tn: np.ndarray, *, most: int, least_count: int = 3) -> list[list[Special]]:
    """Returns, for each expert, the token ids that characterise it most. These have the largest count x log(lift), a term
    of the log-likelihood of the expert's tokens. Leaves out ids that the expert takes fewer than `least_count` times."""
    ids_V, at_T, count_V = np.unique(token_T, return_inverse=True, return_counts=True)
    found = []
    for taken_T in taken_Tn.T:
        rows = np.flatnonzero(taken_T)
        mine_V = np.bincount(at_T[rows], minlength=len(ids_V))
        with np.errstate(divide="ignore", invalid="ignore"):
            lift_V = mine_V / count_V / (len(rows) / len(token_T))
            score_V = np.where((mine_V >= least_count) & (lift_V > 1), mine_V * np.log(lift_V), 0.0)
        best = [int(v) for v in np.argsort(-score_V, kind="stable")[:most] if score_V[v] > 0]
        found.append(
            [
                Special(
                    int(ids_V[v]),
                    int(mine_V[v]),
                    float(mine_V[v] / count_V[v]),
                    float(lift_V[v]),
                    int(rows[(at_T[rows] == v).argmax()]),
                )
                for v in best
            ]
        )
    return found


class Traffic(NamedTuple):
    """Numbers of rows that dispatch sends in forward, summed over tokens and layers, and the imbalance of the ranks' work.

    Attributes:
        pairs: Number of (token, expert) pairs that experts compute.
        pairs_remote: Number of pairs whose expert is on another rank. Without deduplication this is the number of rows.
        rows: Number of rows sent to other ranks, one for each (token, rank).
        between: Maps a node size to the number of rows that leave a node: one for each (token, rank on another node).
        between_hierarchical: Maps a node size to the number of rows that leave a node if a token goes to each node once.
        imbalance: Work (pairs x FFN width) of the busiest rank / mean work of a rank, averaged over layers.
    """

    pairs: int
    pairs_remote: int
    rows: int
    between: Mapping[int, int]
    between_hierarchical: Mapping[int, int]
    imbalance: float


def traffic(
    ids_TLK: np.ndarray,
    sequence_T: np.ndarray,
    placement: ExpertPlacement,
    node_sizes: tuple[int, ...],
    *,
    micro_batch: int,
    first: int = 0,
) -> Traffic:
    """Counts the rows that the choices `ids_TLK` send with a placement. As in training, the ranks take turns: each rank
    gets the next `micro_batch` sequences. `node_sizes` are numbers of ranks per node. Consecutive ranks share a node;
    `first` is the position of the EP group's first rank in its node."""
    ranks, experts = placement.num_ranks, placement.num_experts
    home_T = sequence_T // micro_batch % ranks
    width_E = np.array(placement.width_of_expert, np.float64)
    pairs = pairs_remote = rows = 0
    between, hierarchical = dict.fromkeys(node_sizes, 0), dict.fromkeys(node_sizes, 0)
    ratios = []
    for layer, ids_TK in enumerate(ids_TLK.transpose(1, 0, 2)):
        token, place = np.nonzero((ids_TK >= 0) & (ids_TK < experts))
        expert = ids_TK[token, place]
        rank_N = placement.computing_ranks(layer)[home_T[token], expert]
        goes_TR = np.zeros((len(ids_TK), ranks), bool)
        goes_TR[token, rank_N] = True
        pairs += len(token)
        pairs_remote += int((rank_N != home_T[token]).sum())
        goes_TR[np.arange(len(home_T)), home_T] = False
        rows += int(goes_TR.sum())
        for size in node_sizes:
            node_R = (first + np.arange(ranks)) // size
            away_TR = goes_TR & (node_R != node_R[home_T][:, None])
            between[size] += int(away_TR.sum())
            starts = np.flatnonzero(np.diff(node_R, prepend=-1))
            hierarchical[size] += int(np.logical_or.reduceat(away_TR, starts, axis=1).sum())
        work_R = np.bincount(rank_N, weights=width_E[expert], minlength=ranks)
        if work_R.any():
            ratios.append(work_R.max() / work_R.mean())
    return Traffic(pairs, pairs_remote, rows, between, hierarchical, float(np.mean(ratios)) if ratios else float("nan"))


def same_experts(first_TLK: np.ndarray, second_TLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Compares two routings of the same tokens. Returns the number of (token, true expert) pairs that both routings have /
    the number that at least one of them has, float64 [L] (Jaccard 1901)."""
    shares = []
    for one_TK, other_TK in zip(first_TLK.transpose(1, 0, 2), second_TLK.transpose(1, 0, 2), strict=True):
        sets = []
        for ids_TK in (one_TK, other_TK):
            token, place = np.nonzero((ids_TK >= 0) & (ids_TK < num_experts))
            sets.append(token * num_experts + ids_TK[token, place])
        either = len(np.union1d(*sets))
        shares.append(len(np.intersect1d(*sets)) / either if either else np.nan)
    return np.array(shares)
