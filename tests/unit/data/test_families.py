"""Variants of an emoji form a family. The split keeps a family, and also pictures that are nearly equal, on one side."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_dist.data.families import emoji_family, hold_out, join, near_pairs, variants


def points(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("👍", "👍🏿"),  # skin tone
        ("❤️", "❤"),  # variation selector
        ("🏃‍♀️", "🏃‍♂️"),  # gender sign after a zero-width joiner
        ("👨🏽‍🚒", "👩‍🚒"),  # man and woman
        ("👩‍🚒", "🧑‍🚒"),  # woman and person
        ("🏃🏽‍♀️‍➡️", "🏃"),  # direction
        ("👦", "👧"),
        ("👫🏻", "🧑🏾‍🤝‍🧑🏿"),
        ("👩‍❤️‍👨", "💑"),
        ("🤴", "👸🏼"),
    ],
)
def test_variants_are_one_family(one: str, other: str) -> None:
    assert emoji_family(points(one)) == emoji_family(points(other))


@pytest.mark.parametrize(
    ("one", "other"), [("♀", "♂"), ("🏃➡", "🏃"), ("➡", "⬅"), ("👩‍🚒", "👩‍🚀"), ("🧑", "🧒"), ("🇩🇪", "🇫🇷")]
)
def test_different_things_are_not(one: str, other: str) -> None:
    assert emoji_family(points(one)) != emoji_family(points(other))


def test_near_pairs_are_those_with_at_most_so_many_different_cells() -> None:
    rng = np.random.default_rng(0)
    grids = rng.integers(0, 500, (200, 64)).astype(np.uint16)
    grids[150:] = grids[:50]
    for row, cells in enumerate(range(50)):
        grids[150 + row, rng.permutation(64)[: cells % 12]] += 1
    brute = [(i, j) for i in range(200) for j in range(200) if (grids[i] != grids[j]).sum() <= 8]
    assert near_pairs(grids, grids, most=8) == brute
    assert (0, 150) in brute
    assert (8, 158) in brute
    assert (9, 159) not in brute


def test_join_follows_keys_and_pairs() -> None:
    assert join(["a", "b", "a", "c", "d", "e"], [(3, 1), (4, 3)]).tolist() == [0, 1, 0, 1, 1, 5]


@given(
    components=st.lists(st.integers(0, 30), min_size=2, max_size=200),
    fraction=st.floats(0, 0.9),
    seed=st.integers(0, 100),
)
def test_whole_components_are_held_out(components: list[int], fraction: float, seed: int) -> None:
    component_N = np.array(components)
    sizes_N = 1 + np.arange(len(components)) % 5
    held_out = hold_out(component_N, sizes_N, fraction=fraction, seed=seed)
    assert not set(component_N[held_out]) & set(component_N[~held_out])
    if fraction == 0:
        assert not held_out.any()
    elif len(set(components)) > 1:
        assert 0 < held_out.sum() < len(components)
        if len(set(component_N[held_out])) > 1:
            assert sizes_N[held_out].sum() <= fraction * sizes_N.sum()


def test_no_family_is_most_of_the_held_out_side() -> None:
    component_N = np.concatenate([np.zeros(40, np.int64), np.arange(1, 461)])  # 500 items; 50 are held out
    for seed in range(20):
        held_out = hold_out(component_N, np.ones(500, np.int64), fraction=0.1, seed=seed)
        assert held_out.sum() == 50
        assert not held_out[:40].any()


def test_variants_leave_each_family_its_first() -> None:
    families = ["a", "a", "b", "a", "b", "c", "c"]
    # The items are a0 a1 b2 a3 b4 c5 c6. a3 is similar to b4, and c6 is similar to a0.
    components = np.array([0, 1, 2, 3, 3, 5, 0])
    assert variants(families, components).tolist() == [False, True, False, True, True, False, False]
    assert not variants(["a", "b"], np.array([0, 1])).any()


@given(
    items=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 30)), min_size=1, max_size=60),
    fraction=st.floats(0.05, 1.0),
)
def test_of_a_variant_the_family_is_trained_on(items: list[tuple[int, int]], fraction: float) -> None:
    families, component_N = [family for family, _ in items], np.array([component for _, component in items])
    may = variants(families, component_N)
    held_out = np.zeros(len(items), bool)
    if may.any():
        held_out[may] = hold_out(component_N[may], np.ones(may.sum(), np.int64), fraction=fraction, seed=0)
    trained = {family for family, held in zip(families, held_out.tolist(), strict=True) if not held}
    assert trained == set(families)
    assert not set(component_N[held_out]) & set(component_N[~held_out])
