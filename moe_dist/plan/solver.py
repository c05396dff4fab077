"""Finds a placement that minimises the work of the busiest ranks for measured loads. Imports no torch.

All layers share one map of experts to ranks. A step lasts as long as the sum over layers of the busiest rank's work, so
this sum is minimised: first by the greedy rule of longest processing time (Graham 1969; DeepSeek's EPLB packs experts by
it), then by the best swaps of two experts. No swap makes the sum larger, so the result is never worse than the greedy one.

Shape letters: L layers, E experts and then free slots, R ranks.
"""

import numpy as np

from moe_dist.errors import ConfigError

STEPS = 120  # experts for which all swaps are tried; each takes L x E operations


def pace(load_LE: np.ndarray, rank_E: np.ndarray, ranks: int) -> float:
    """Returns the sum over layers of the busiest rank's load."""
    return float(rank_loads(load_LE, rank_E, ranks).max(1).sum())


def solve(
    load_LE: np.ndarray, slots_R: np.ndarray, *, allowed_ER: np.ndarray | None = None, steps: int = STEPS
) -> np.ndarray:
    """Returns the rank of each expert, int64 [E].

    Args:
        load_LE: Work of each expert in each layer.
        slots_R: Most experts of each rank, as its memory allows.
        allowed_ER: Whether a rank may hold an expert: the ranks of a pinned group, or the node that an expert must not
            leave. None allows all.

    Raises:
        ConfigError: the slots cannot hold the experts.
    """
    experts, ranks = load_LE.shape[1], len(slots_R)
    free = int(slots_R.sum()) - experts
    if free < 0:
        raise ConfigError(f"slots={int(slots_R.sum())}: fewer than the {experts} experts; give a rank more slots")
    allowed_ER = np.ones((experts, ranks), bool) if allowed_ER is None else allowed_ER
    rank_E = _greedy(load_LE.sum(0), slots_R, allowed_ER)
    left_R = slots_R - np.bincount(rank_E, minlength=ranks)
    rank_E = np.concatenate([rank_E, np.repeat(np.arange(ranks), left_R)])  # a move is a swap with a free slot
    load_LE = np.pad(load_LE.astype(float), ((0, 0), (0, free)))
    allowed_ER = np.pad(allowed_ER, ((0, free), (0, 0)), constant_values=True)
    _swap(load_LE, rank_E, allowed_ER, np.zeros(len(rank_E)), steps)
    return rank_E[:experts]


def improve(load_LE: np.ndarray, rank_E: np.ndarray, group_E: np.ndarray, ranks: int, *, steps: int = STEPS) -> np.ndarray:
    """Returns ranks with a lower `pace`, by swaps of two experts of a group. So each rank keeps its number of experts of
    each group, and few experts move. Whole numbers as loads give the same result on every machine."""
    rank_E = rank_E.copy()
    _swap(load_LE.astype(float), rank_E, np.ones((len(rank_E), ranks), bool), group_E, steps)
    return rank_E


def slots_of(rank_E: np.ndarray, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Returns the experts of each rank, sorted, as `ExpertPlacement` takes them."""
    return tuple(tuple(np.flatnonzero(rank_E == rank).tolist()) for rank in range(ranks))


def _greedy(load_E: np.ndarray, slots_R: np.ndarray, allowed_ER: np.ndarray) -> np.ndarray:
    """Gives the heaviest expert to the least loaded rank that may hold it, and so on; experts with fewest ranks first."""
    rank_E, work_R, left_R = np.zeros(len(load_E), np.int64), np.zeros(len(slots_R)), slots_R.copy()
    for expert in np.lexsort((-load_E, allowed_ER.sum(1))):
        open_R = allowed_ER[expert] & (left_R > 0)
        if not open_R.any():
            raise ConfigError(
                f"expert {expert}: ranks {np.flatnonzero(allowed_ER[expert]).tolist()} may hold it, but all their slots "
                "are taken; give one of them more slots, or let the expert on other ranks"
            )
        rank = int(np.where(open_R, work_R, np.inf).argmin())
        rank_E[expert], work_R[rank], left_R[rank] = rank, work_R[rank] + load_E[expert], left_R[rank] - 1
    return rank_E


def rank_loads(load_LE: np.ndarray, rank_E: np.ndarray, ranks: int) -> np.ndarray:
    """Returns the load of each rank in each layer, [L, R]."""
    return load_LE @ (rank_E[:, None] == np.arange(ranks))


def _swap(load_LE: np.ndarray, rank_E: np.ndarray, allowed_ER: np.ndarray, group_E: np.ndarray, steps: int) -> None:
    """Swaps experts of the same group in `rank_E`, in place, to lower `pace`. Each step takes the expert that adds most to
    the loads of the busiest ranks, and swaps it with the expert or free slot that lowers `pace` most, if one does. Ends
    after `steps` steps, or if all such experts were tried in vain."""
    ranks = allowed_ER.shape[1]
    work_LR = rank_loads(load_LE, rank_E, ranks)
    tried = np.zeros(len(rank_E), bool)  # since the last swap
    for _ in range(steps if ranks > 1 else 0):
        busiest_L = work_LR.argmax(1)
        # What an expert adds to the pace: its load in the layers whose busiest rank holds it.
        blame_E = np.where(rank_E == busiest_L[:, None], load_LE, 0.0).sum(0)
        blame_E[tried] = -1.0
        one = int(blame_E.argmax())
        if blame_E[one] <= 0.0:
            return
        home = rank_E[one]
        top_L3 = np.argsort(-work_LR, axis=1)[:, :3]
        others_LR = _largest_without(work_LR, top_L3, home)
        change_LE = load_LE - load_LE[:, [one]]  # of the home rank
        new_LE = np.maximum(work_LR[:, [home]] + change_LE, work_LR[:, rank_E] - change_LE)
        pace_E = np.maximum(new_LE, others_LR[:, rank_E]).sum(0)
        barred_E = (rank_E == home) | ~allowed_ER[one, rank_E] | ~allowed_ER[:, home] | (group_E != group_E[one])
        pace_E[barred_E] = np.inf
        other = int(pace_E.argmin())
        if pace_E[other] < work_LR.max(1).sum() * (1 - 1e-9):
            work_LR[:, home] += change_LE[:, other]
            work_LR[:, rank_E[other]] -= change_LE[:, other]
            rank_E[one], rank_E[other] = rank_E[other], home
            tried[:] = False
        tried[one] = True


def _largest_without(work_LR: np.ndarray, top_L3: np.ndarray, home: int) -> np.ndarray:
    """Returns for each layer and rank r the largest work of all ranks but `home` and r, [L, R]; 0 if there is none."""
    layers, ranks = work_LR.shape
    found_LR = np.zeros((layers, ranks))
    for place in reversed(range(top_L3.shape[1])):  # the best place that is neither wins
        rank_L1 = top_L3[:, [place]]
        fits_LR = (rank_L1 != home) & (rank_L1 != np.arange(ranks))
        found_LR = np.where(fits_LR, np.take_along_axis(work_LR, rank_L1, 1), found_LR)
    return found_LR
