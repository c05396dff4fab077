"""The placement solver is never worse than the published greedy algorithm, is near the optimum, and respects slots,
groups and nodes."""

import itertools

import numpy as np
import pytest

from moe_dist.errors import ConfigError
from moe_dist.plan.solver import improve, pace, slots_of, solve
from tests.support.messages import refused


def packed(load_E: np.ndarray, ranks: int) -> np.ndarray:
    """Packs like EPLB without replicas: in the order of falling load, each expert goes to the least loaded rank with a
    free slot."""
    rank_of, work, count = [0] * len(load_E), [0.0] * ranks, [0] * ranks
    for expert in sorted(range(len(load_E)), key=lambda e: -load_E[e]):
        rank = min((r for r in range(ranks) if count[r] < len(load_E) // ranks), key=lambda r: work[r])
        rank_of[expert], work[rank], count[rank] = rank, work[rank] + load_E[expert], count[rank] + 1
    return np.array(rank_of)


def draw(rng: np.random.Generator) -> tuple[np.ndarray, int]:
    ranks = int(rng.choice([2, 4, 8]))
    experts, layers = ranks * int(rng.integers(1, 5)), int(rng.integers(1, 5))
    load_LE = rng.gamma(rng.choice([0.3, 1.0, 5.0]), size=(layers, experts))
    return load_LE * (rng.random((layers, experts)) < rng.choice([0.5, 1.0])), ranks


@pytest.mark.slow
def test_never_worse_than_the_published_greedy_on_a_thousand_loads() -> None:
    rng, gained = np.random.default_rng(0), []
    for _ in range(1000):
        load_LE, ranks = draw(rng)
        slots_R = np.full(ranks, load_LE.shape[1] // ranks)
        found = solve(load_LE, slots_R, steps=40)
        assert np.bincount(found, minlength=ranks).tolist() == slots_R.tolist()
        theirs = pace(load_LE, packed(load_LE.sum(0), ranks), ranks)
        ours = pace(load_LE, found, ranks)
        assert ours <= theirs * (1 + 1e-12)
        gained.append(ours / theirs if theirs else 1.0)
    assert np.mean(gained) < 0.96


def test_close_to_the_best_of_all_maps() -> None:
    rng, ratios = np.random.default_rng(1), []
    maps = np.array([each for each in itertools.product(range(3), repeat=6) if set(map(each.count, range(3))) == {2}])
    for _ in range(20):
        load_LE = rng.gamma(0.5, size=(3, 6))
        best = min(pace(load_LE, each, 3) for each in maps)
        ratios.append(pace(load_LE, solve(load_LE, np.full(3, 2)), 3) / best)
    assert min(ratios) >= 1 - 1e-12
    assert np.mean(ratios) < 1.03


def test_swaps_stay_in_their_group_and_lower_the_pace() -> None:
    """Two ranks have experts with loads 4 4 and 0 0. A swap gives both ranks loads 4 0, unless the experts belong to
    different groups. On random loads, no rank's number of experts per group changes, the pace (the busiest ranks' load,
    summed over layers) never rises, and it falls by more than 10 % on average."""
    one = np.zeros(4)
    start_E = np.array([0, 0, 1, 1])
    assert pace(np.array([[4, 4, 0, 0]]), improve(np.array([[4, 4, 0, 0]]), start_E, one, 2), 2) == 4
    assert improve(np.array([[4, 4, 0, 0]]), start_E, np.array([0, 0, 1, 1]), 2).tolist() == start_E.tolist()
    rng, ratios = np.random.default_rng(3), []
    for _ in range(100):
        load_LE, ranks = draw(rng)
        experts = load_LE.shape[1]
        rank_E, group_E = rng.permutation(np.arange(experts) % ranks), rng.integers(0, 2, experts)
        found_E = improve(load_LE, rank_E, group_E, ranks)
        for group in range(2):
            counts = [np.bincount(each[group_E == group], minlength=ranks).tolist() for each in (rank_E, found_E)]
            assert counts[0] == counts[1]
        before, after = pace(load_LE, rank_E, ranks), pace(load_LE, found_E, ranks)
        assert after <= before * (1 + 1e-12)
        ratios.append(after / before if before else 1.0)
    assert np.mean(ratios) < 0.9


def test_uneven_slots_pinned_groups_and_nodes() -> None:
    rng = np.random.default_rng(2)
    load_LE, slots_R = rng.random((4, 12)), np.array([8, 2, 1, 4])
    allowed_ER = np.zeros((12, 4), bool)
    allowed_ER[:5, 2:] = allowed_ER[5:, :2] = True  # like a pinned group, or experts bound to a node
    found = solve(load_LE, slots_R, allowed_ER=allowed_ER)
    assert allowed_ER[np.arange(12), found].all()
    assert (np.bincount(found, minlength=4) <= slots_R).all()
    assert pace(load_LE, found, 4) <= pace(load_LE, solve(load_LE, slots_R, allowed_ER=allowed_ER, steps=0), 4)
    assert sorted(itertools.chain(*slots_of(found, 4))) == list(range(12))
    with refused(ConfigError, "slots=3"):
        solve(load_LE, np.array([1, 2]))
    with refused(ConfigError, "expert"):
        solve(load_LE, np.array([8, 2, 1, 1]), allowed_ER=allowed_ER)


def test_one_rank() -> None:
    assert solve(np.ones((2, 3)), np.array([3])).tolist() == [0, 0, 0]
    assert pace(np.ones((2, 3)), np.zeros(3, int), 1) == pytest.approx(6)
