"""Copies of an expert share its work. The resulting time is close to the time with the best use of the free slots."""

import itertools

import numpy as np
import pytest

from moe_dist.plan.solver import pace, solve
from research.bench.expert_copies import Copied, solve_with_copies
from tests.unit.plan.test_solver import draw, packed


def test_copies_share_the_work_and_are_close_to_the_best() -> None:
    rng, ratios = np.random.default_rng(4), []
    for _ in range(200):
        load_LE, ranks = draw(rng)
        slots_R = rng.integers(1, 4, ranks) + load_LE.shape[1] // ranks
        found = solve_with_copies(load_LE, slots_R, steps=40)
        assert set(found.expert_P) == set(range(load_LE.shape[1]))
        assert (np.bincount(found.rank_P, minlength=ranks) <= slots_R).all()
        copies_E, work_LR = np.bincount(found.expert_P), np.zeros((len(load_LE), ranks))
        for expert, rank in zip(found.expert_P, found.rank_P, strict=True):
            work_LR[:, rank] += load_LE[:, expert] / copies_E[expert]
        assert found.pace(load_LE, ranks) == pytest.approx(work_LR.max(1).sum())
        assert found.pace(load_LE, ranks) <= pace(load_LE, solve(load_LE, slots_R, steps=40), ranks) * (1 + 1e-12)
    ranks, theirs = 3, []
    for _ in range(20):  # compares with the best of all ways to put four experts into six slots
        load_LE = rng.gamma(0.5, size=(2, 4))
        every = [each for each in itertools.product(range(4), repeat=6) if set(each) == set(range(4))]
        best = min(float(shared_work(load_LE, each, ranks).max(1).sum()) for each in every)
        ratios.append(solve_with_copies(load_LE, np.full(ranks, 2)).pace(load_LE, ranks) / best)
        copies_E = np.ones(4)
        for _ in range(2):  # adds two copies by EPLB's greedy rule
            copies_E[(load_LE.sum(0) / copies_E).argmax()] += 1
        expert_P = np.repeat(np.arange(4), copies_E.astype(int))
        rank_P = packed((load_LE.sum(0) / copies_E)[expert_P], ranks)
        theirs.append(Copied(expert_P, rank_P).pace(load_LE, ranks) / best)
        assert ratios[-1] <= theirs[-1] * (1 + 1e-12)
    assert min(ratios) >= 1 - 1e-12
    assert np.mean(ratios) < 0.95 * np.mean(theirs)
    pinned_ER = np.array([[True, False], [True, True]])
    one = solve_with_copies(np.array([[9.0, 1.0]]), np.array([2, 2]), allowed_ER=pinned_ER)
    assert set(one.rank_P[one.expert_P == 0]) == {0}, "a copy stays where its expert may be"


def shared_work(load_LE: np.ndarray, expert_of_slot: tuple[int, ...], ranks: int) -> np.ndarray:
    work_LR = np.zeros((len(load_LE), ranks))
    for slot, expert in enumerate(expert_of_slot):
        work_LR[:, slot % ranks] += load_LE[:, expert] / expert_of_slot.count(expert)
    return work_LR
