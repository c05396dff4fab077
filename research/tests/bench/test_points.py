"""Tests the routing of a benchmark point: null choices, distinct experts, skew, modality, placement, repeatable draws."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from research.bench.points import ABSENT, BASE, DROPLESS, HOT_EXPERTS, Choices, Point, draw, slots, sweeps

SMALL = Point(tokens=200, hidden=8, experts=16, top_k=4)


def drawn(point: Point, rank: int = 0) -> Choices:
    return draw(point, rank=rank, world_size=2, seed=0)


@pytest.mark.parametrize("null", [0.0, 0.25, 0.9])
def test_exactly_the_share_of_nulls_is_absent(null: float) -> None:
    choices = drawn(replace(SMALL, null=null))
    assert (choices.taken_TK == ABSENT).sum() == round(null * 800)
    kept = choices.taken_TK != ABSENT
    np.testing.assert_array_equal(choices.taken_TK[kept], choices.drawn_TK[kept])
    assert (choices.equal_active_TK != ABSENT).sum() == kept.sum()
    per_token = (choices.equal_active_TK != ABSENT).sum(1)
    assert per_token.max() - per_token.min() <= 1


@pytest.mark.parametrize("point", [SMALL, replace(SMALL, hot=0.95), replace(SMALL, image=0.3)], ids=str)
def test_experts_of_a_token_are_distinct(point: Point) -> None:
    assert all(len(set(row)) == point.top_k for row in drawn(point).drawn_TK.tolist())


def test_a_skewed_routing_prefers_the_hot_experts() -> None:
    def share(hot: float | None) -> float:
        choices = drawn(replace(SMALL, tokens=4000, top_k=1, hot=hot))
        return float((choices.drawn_TK < HOT_EXPERTS).mean())

    assert share(None) == pytest.approx(0.25, abs=0.03)
    assert share(0.95) == pytest.approx(0.95, abs=0.02)


def test_image_tokens_choose_among_the_second_half() -> None:
    of_image = drawn(replace(SMALL, image=0.3)).drawn_TK >= 8
    assert (of_image.all(1) | ~of_image.any(1)).all()
    assert of_image.all(1).sum() == 60


def test_draws_are_the_same_each_time_and_differ_between_ranks() -> None:
    np.testing.assert_array_equal(drawn(SMALL).taken_TK, drawn(SMALL).taken_TK)
    assert not np.array_equal(drawn(SMALL).taken_TK, drawn(SMALL, rank=1).taken_TK)


def test_a_workload_is_cut_into_the_ranks_slices() -> None:
    ragged = replace(SMALL, null=0.0, workload="W4")
    sizes = [len(drawn(ragged, rank).drawn_TK) for rank in range(2)]
    assert sum(sizes) == 400
    assert sizes[0] != sizes[1]


def test_placements() -> None:
    point = replace(SMALL, experts=4)
    assert slots(point, 2) == ((0, 1), (2, 3))
    assert slots(replace(point, policy="interleaved"), 2) == ((0, 2), (1, 3))


def test_each_sweep_varies_one_factor() -> None:
    for sweep, points in sweeps().items():
        base = DROPLESS if sweep.endswith("no nulls") or sweep == "workload" else BASE
        changed = Counter(
            field for _, point in points for field in vars(point) if getattr(point, field) != getattr(base, field)
        )
        changed.pop("policy", None)
        assert len(changed) <= 1, f"{sweep}: {changed}"
        assert len({label for label, _ in points}) == len(points)
