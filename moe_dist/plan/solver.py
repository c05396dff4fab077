"""Finds a placement of experts that minimises the busiest ranks' work for measured loads. Imports no torch.

All layers share one map of experts to ranks. A step takes as long as the busiest rank's work, summed over layers. This sum
is minimised first by the greedy rule of longest processing time (Graham 1969; also used by DeepSeek's EPLB), and then by
the best swaps of two experts. No swap increases the sum, so the result is never worse than the greedy placement.

Shape letters: L layers, E experts, R ranks, P items with one slot each (experts or their copies), S items and free slots.
"""

import numpy as np

from moe_dist.errors import ConfigError

STEPS = 120  # number of experts for which all swaps are tried, with L x E operations per expert


def pace(load_LE: np.ndarray, rank_E: np.ndarray, ranks: int) -> float:
    """Returns the sum over layers of the busiest rank's load."""
    return float(rank_loads(load_LE, rank_E, ranks).max(1).sum())


def solve(
    load_LE: np.ndarray, slots_R: np.ndarray, *, allowed_ER: np.ndarray | None = None, steps: int = STEPS
) -> np.ndarray:
    """Returns the rank of each expert, int64 [E]. Raises ConfigError if there are fewer slots than experts.

    Args:
        load_LE: Work of each expert in each layer.
        slots_R: Largest number of experts for which each rank has memory.
        allowed_ER: Whether each expert may be on each rank (for a pinned group, only on its ranks). None allows all.
    """
    experts, ranks = load_LE.shape[1], len(slots_R)
    free = int(slots_R.sum()) - experts
    if free < 0:
        raise ConfigError(f"slots={int(slots_R.sum())}: fewer than the {experts} experts; give a rank more slots")
    allowed_ER = np.ones((experts, ranks), bool) if allowed_ER is None else allowed_ER
    return placed(load_LE, slots_R, allowed_ER, steps)


def placed(load_LP: np.ndarray, slots_R: np.ndarray, allowed_PR: np.ndarray, steps: int) -> np.ndarray:
    """Returns the rank of each item, where an item is an expert or one of its copies. For the arguments see `solve`."""
    ranks, items = len(slots_R), load_LP.shape[1]
    rank_P = _greedy(load_LP.sum(0), slots_R, allowed_PR)
    # A free slot is an item without load. Moving an expert is then a swap with a free slot.
    free = np.repeat(np.arange(ranks), slots_R - np.bincount(rank_P, minlength=ranks))
    rank_S, load_LS = np.concatenate([rank_P, free]), np.pad(load_LP.astype(float), ((0, 0), (0, len(free))))
    allowed_SR = np.pad(allowed_PR, ((0, len(free)), (0, 0)), constant_values=True)
    _swap(load_LS, rank_S, allowed_SR, np.zeros(len(rank_S)), steps)
    return rank_S[:items]


def improve(load_LE: np.ndarray, rank_E: np.ndarray, group_E: np.ndarray, ranks: int, *, steps: int = STEPS) -> np.ndarray:
    """Returns ranks with a lower `pace`, by swapping pairs of experts of one group. Each rank thus keeps its number of
    experts of each group, and few experts move. If loads are integers, the result is the same on every machine."""
    rank_E = rank_E.copy()
    _swap(load_LE.astype(float), rank_E, np.ones((len(rank_E), ranks), bool), group_E, steps)
    return rank_E


def slots_of(rank_E: np.ndarray, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns the sorted experts of each rank, in the form that `ExpertPlacement` takes."""
    return tuple(tuple(np.flatnonzero(rank_E == rank).tolist()) for rank in range(ranks))


def _greedy(load_P: np.ndarray, slots_R: np.ndarray, allowed_PR: np.ndarray) -> np.ndarray:
    """Assigns each item to the least loaded of the ranks on which it is allowed and a slot is free. Items that are allowed
    on fewer ranks come first. If the numbers of ranks are equal, heavier items come first."""
    rank_P, work_R, left_R = np.zeros(len(load_P), np.int64), np.zeros(len(slots_R)), slots_R.copy()
    for item in np.lexsort((-load_P, allowed_PR.sum(1))):
        open_R = allowed_PR[item] & (left_R > 0)
        if not open_R.any():
            raise ConfigError(
                f"expert {item}: ranks {np.flatnonzero(allowed_PR[item]).tolist()} may hold it, but all their slots "
                "are taken; give one of them more slots, or let the expert on other ranks"
            )
        rank = int(np.where(open_R, work_R, np.inf).argmin())
        rank_P[item], work_R[rank], left_R[rank] = rank, work_R[rank] + load_P[item], left_R[rank] - 1
    return rank_P


def rank_loads(load_LE: np.ndarray, rank_E: np.ndarray, ranks: int) -> np.ndarray:
    """Returns the load of each rank in each layer, [L, R]."""
    return load_LE @ (rank_E[:, None] == np.arange(ranks))


def _swap(load_LS: np.ndarray, rank_S: np.ndarray, allowed_SR: np.ndarray, group_S: np.ndarray, steps: int) -> None:
    """Swaps experts of one group in `rank_S`, in place, to lower `pace`. Each step takes the expert that adds most to the
    busiest ranks' loads. It swaps this expert with the expert or free slot that lowers `pace` most, if any lowers it. Ends
    after `steps` steps, or when no swap of an expert on the busiest ranks lowers `pace`."""
    ranks = allowed_SR.shape[1]
    work_LR = rank_loads(load_LS, rank_S, ranks)
    tried = np.zeros(len(rank_S), bool)  # items that have been tried in vain since the last swap
    for _ in range(steps if ranks > 1 else 0):
        busiest_L = work_LR.argmax(1)
        # An expert adds to the busiest ranks' work only in layers in which its own rank is the busiest.
        blame_S = np.where(rank_S == busiest_L[:, None], load_LS, 0.0).sum(0)
        blame_S[tried] = -1.0
        one = int(blame_S.argmax())
        if blame_S[one] <= 0.0:
            return
        home = rank_S[one]
        top_L3 = np.argsort(-work_LR, axis=1)[:, :3]
        others_LR = _largest_without(work_LR, top_L3, home)
        change_LS = load_LS - load_LS[:, [one]]  # for each swap, the change in the load of the rank that has `one`
        new_LS = np.maximum(work_LR[:, [home]] + change_LS, work_LR[:, rank_S] - change_LS)
        pace_S = np.maximum(new_LS, others_LR[:, rank_S]).sum(0)
        barred_S = (rank_S == home) | ~allowed_SR[one, rank_S] | ~allowed_SR[:, home] | (group_S != group_S[one])
        pace_S[barred_S] = np.inf
        other = int(pace_S.argmin())
        if pace_S[other] < work_LR.max(1).sum() * (1 - 1e-9):
            work_LR[:, home] += change_LS[:, other]
            work_LR[:, rank_S[other]] -= change_LS[:, other]
            rank_S[one], rank_S[other] = rank_S[other], home
            tried[:] = False
        tried[one] = True


def _largest_without(work_LR: np.ndarray, top_L3: np.ndarray, home: int) -> np.ndarray:
    """Returns, for each layer and rank r, the largest work of any rank except `home` and r, [L, R]; 0 if there is none."""
    layers, ranks = work_LR.shape
    found_LR = np.zeros((layers, ranks))
    for place in reversed(range(top_L3.shape[1])):  # the last assigned value is of the busiest rank other than `home` and r
        rank_L1 = top_L3[:, [place]]
        fits_LR = (rank_L1 != home) & (rank_L1 != np.arange(ranks))
        found_LR = np.where(fits_LR, np.take_along_axis(work_LR, rank_L1, 1), found_LR)
    return found_LR
