"""Changes a trace's choices as another null policy or another capacity would. All functions are pure.

Shape letters: L MoE layers, T tokens, K choices of a token, E true (not null) experts of all groups, n true experts of a
group.
"""

from collections.abc import Sequence

import numpy as np

from moe_dist.placement.placement import ExpertGroup


def without_nulls(ids_TLK: np.ndarray, group_T: np.ndarray, groups: Sequence[ExpertGroup], *, seed: int = 0) -> np.ndarray:
    """Imitates fixed top-k routing. Replaces each null choice by a true expert of the token's group that the token has not
    chosen. This expert is drawn at random, because a trace does not contain the router's next best experts."""
    num_experts = sum(group.num_experts for group in groups)
    rng, made = np.random.default_rng(seed), ids_TLK.copy()
    column_TLK = np.where(ids_TLK < -1, -2 - ids_TLK, ids_TLK)
    for number, group in enumerate(groups):
        rows = np.flatnonzero(group_T == number)
        for layer in range(ids_TLK.shape[1]):
            ids_TK = column_TLK[rows, layer]
            noise_Tn = rng.random((len(rows), group.num_experts))
            token, place = np.nonzero((ids_TK >= 0) & (ids_TK < num_experts))
            noise_Tn[token, ids_TK[token, place] - group.first_expert] = np.inf  # the token chose these already
            free_Tn = np.argsort(noise_Tn, axis=1) + group.first_expert
            null_TK = ids_TK >= num_experts
            nth_TK = null_TK.cumsum(1) - 1
            # If a token has more choices than its group has true experts, the remaining choices stay empty.
            possible_TK = null_TK & (nth_TK < np.isfinite(noise_Tn).sum(1)[:, None])
            spare_TK = np.take_along_axis(free_Tn, np.minimum(nth_TK, group.num_experts - 1).clip(0), axis=1)
            made[rows, layer] = np.where(null_TK, np.where(possible_TK, spare_TK, -1), made[rows, layer])
    return made


def capped(
    ids_TLK: np.ndarray,
    group_T: np.ndarray,
    batch_T: np.ndarray,
    groups: Sequence[ExpertGroup],
    factor: float,
) -> np.ndarray:
    """Drops (token, expert) pairs as `model.moe.capacity` does with drop=position. Each expert keeps its first ceil(factor
    k T / columns) pairs in each micro-batch, where T is the group's number of traced tokens. The result may keep pairs that
    the run dropped."""
    num_experts = sum(group.num_experts for group in groups)
    made = np.where(ids_TLK < -1, -2 - ids_TLK, ids_TLK)
    _, batch_T = np.unique(batch_T, return_inverse=True)
    batches = int(batch_T.max(initial=-1)) + 1
    tokens_GB = np.stack([np.bincount(batch_T[group_T == g], minlength=batches) for g in range(len(groups))])
    choices = np.array([group.top_k for group in groups])[:, None] * tokens_GB
    columns = np.array([group.num_columns for group in groups])[:, None]
    room_GB = np.ceil(factor * choices / columns - 1e-9).astype(np.int64)
    group_E = np.repeat(np.arange(len(groups)), [group.num_experts for group in groups])
    for layer in range(made.shape[1]):
        token, place = np.nonzero((made[:, layer] >= 0) & (made[:, layer] < num_experts))
        expert = made[token, layer, place]
        bin_N = batch_T[token] * num_experts + expert
        order = np.argsort(bin_N, kind="stable")
        first = np.searchsorted(bin_N[order], bin_N[order])
        rank_N = np.empty(len(order), np.int64)
        rank_N[order] = np.arange(len(order)) - first
        over = rank_N >= room_GB[group_E[expert], batch_T[token]]
        made[token[over], layer, place[over]] = -2 - expert[over]
    return made
