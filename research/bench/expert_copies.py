"""Fills the free slots of ranks with copies of hot experts, as DeepSeek's EPLB does. The planner itself makes no copies.

Shape letters are as in `moe_dist.plan.solver`.
"""

from contextlib import suppress
from typing import NamedTuple

import numpy as np

from moe_dist.errors import ConfigError
from moe_dist.plan.solver import STEPS, pace, placed, solve

PARTS, SWAPPED = 4, 2  # how many different numbers of copies are tried, and how many of the results are improved by swaps


class Copied(NamedTuple):
    """The slots of all ranks, with their experts: `expert_P[p]` has a slot on `rank_P[p]`. The slots of an expert share its
    load evenly. Instead of two copies of an expert, a rank has one copy with twice the share, and a free slot."""

    expert_P: np.ndarray
    rank_P: np.ndarray

    def pace(self, load_LE: np.ndarray, ranks: int) -> float:
        """Returns the load of the busiest rank, summed over layers."""
        return pace(_shared(load_LE, self.expert_P), self.rank_P, ranks)


def solve_with_copies(
    load_LE: np.ndarray, slots_R: np.ndarray, *, allowed_ER: np.ndarray | None = None, steps: int = STEPS
) -> Copied:
    """Fills free slots with copies of experts, if the copies lower `pace`. Arguments and errors are as in `solve`.

    The next copy always goes to the expert with the largest load per copy. This is the rule of highest averages, which
    DeepSeek's EPLB also uses.
    """
    experts, ranks = load_LE.shape[1], len(slots_R)
    once = Copied(np.arange(experts), solve(load_LE, slots_R, allowed_ER=allowed_ER, steps=steps))
    free = int(slots_R.sum()) - experts
    if not free:
        return once
    allowed_ER = np.ones((experts, ranks), bool) if allowed_ER is None else allowed_ER

    def filled(expert_P: np.ndarray, steps: int) -> Copied:
        return Copied(expert_P, placed(_shared(load_LE, expert_P), slots_R, allowed_ER[expert_P], steps))

    # Two orders of copies are tried: by the experts' load summed over layers, and by their load in the heaviest layer. Each
    # order is tried with all free slots, and with only some of the free slots.
    tried: list[Copied] = []
    for load_E in (load_LE.sum(0), load_LE.max(0)):
        order = _copied(load_E, free)
        for count in sorted({-(-len(order) * part // PARTS) for part in range(1, PARTS + 1)}):
            with suppress(ConfigError):  # raised if the ranks of a pinned group have too few slots for these copies
                tried.append(filled(np.sort(np.concatenate([np.arange(experts), order[:count]])), 0))
    best = sorted(tried, key=lambda each: each.pace(load_LE, ranks))[:SWAPPED]
    return min([once, *(filled(each.expert_P, steps) for each in best)], key=lambda each: each.pace(load_LE, ranks))


def _copied(load_E: np.ndarray, free: int) -> np.ndarray:
    """Returns the experts that get one more slot each, in the order in which they get it."""
    copies_E, order = np.ones(len(load_E), np.int64), np.zeros(free, np.int64)
    for place in range(free):
        order[place] = (load_E / copies_E).argmax()
        copies_E[order[place]] += 1
    return order


def _shared(load_LE: np.ndarray, expert_P: np.ndarray) -> np.ndarray:
    """Returns the load of each slot, [L, P]."""
    return (load_LE / np.maximum(1, np.bincount(expert_P, minlength=load_LE.shape[1])))[:, expert_P]
