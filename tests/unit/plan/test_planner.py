"""Expected load and traffic equal the means over an enumeration of all choices. Also tests the text that compares two
plans."""

import itertools

import pytest

from moe_dist.config.parallel.section import PinnedSection
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from moe_dist.plan.planner import PlanComparison, compare, expected_plan, render, verdict
from moe_dist.plan.policies import make_placement

TEXT = ExpertGroup("text", 3, 2, 2, 10, 0, ("text",))
IMAGE = ExpertGroup("image", 2, 1, 2, 20, 3, ("image",))
SLOTS = ((0, 1), (2, 3), (4,))
MIX = {"text": 30, "image": 10}


def enumerate_choices(placement: ExpertPlacement, shares: dict[str, float]) -> tuple[list[float], list[float]]:
    """Returns load and remote rows per token, as means over all source ranks and all sets of choices."""
    ranks = placement.num_ranks
    load, remote = [0.0] * ranks, [0.0] * ranks
    for group in placement.groups:
        columns = [*group.experts, *[None] * group.num_null]
        every = list(itertools.combinations(range(len(columns)), group.top_k))
        for source, choice in itertools.product(range(ranks), every):
            weight = shares[group.name] / len(every) / ranks
            experts = [columns[c] for c in choice if columns[c] is not None]
            for expert in experts:
                load[placement.rank_of_expert[expert]] += weight * group.ffn_dim
            for rank in {placement.rank_of_expert[expert] for expert in experts} - {source}:
                remote[rank] += weight
    return load, remote


def test_expectations_are_exact() -> None:
    placement = ExpertPlacement((TEXT, IMAGE), SLOTS)
    load, remote = enumerate_choices(placement, {"text": 0.75, "image": 0.25})
    plan = expected_plan(placement, MIX, name="x")
    assert plan.load_R == pytest.approx(load)
    assert plan.remote_R == pytest.approx(remote)
    assert plan.remote_rows_per_token == pytest.approx(sum(remote))
    assert plan.efficiency == pytest.approx(sum(load) / 3 / max(load))


def test_one_rank_exchanges_nothing() -> None:
    plan = expected_plan(ExpertPlacement((TEXT, IMAGE), ((0, 1, 2, 3, 4),)), MIX, name="x")
    assert plan.remote_rows_per_token == 0
    assert plan.efficiency == 1


def even(n: int, first: int, name: str) -> ExpertGroup:
    return ExpertGroup(name, n, 0, 2, 10, first, (name,))


def words_of(comparison: PlanComparison, chosen: int = 0) -> str:
    """Returns the text about one of the two plans."""
    others = [plan for n, plan in enumerate(comparison.plans) if n != chosen]
    return verdict(comparison.plans[chosen], others, comparison.missing, itemsize=2)


def test_a_skewed_mix_gives_the_pinned_ranks_uneven_work_and_fewer_rows() -> None:
    of = (even(4, 0, "text"), even(4, 4, "image"))
    comparison = compare(of, 4, {"text": 900, "image": 100})
    pinned, interleaved = comparison.plans
    assert (pinned.name, interleaved.name) == ("pinned", "interleaved")
    rows = 1 - pinned.remote_rows_per_token / interleaved.remote_rows_per_token
    assert rows > 0
    start = f"This run uses pinned placement, which sends {rows:.1%} fewer rows than interleaved; "
    # The busiest rank has 0.9 / 2 of the work instead of 1 / 4.
    assert words_of(comparison).startswith(start + "its busiest rank has 80.0% more work")
    assert f"which sends {rows / (1 - rows):.1%} more rows than pinned; its busiest rank has 44.4% less work" in words_of(
        comparison, 1
    )


def test_what_cannot_be_is_said() -> None:
    comparison = compare((TEXT, IMAGE), 1, MIX)
    assert [plan.name for plan in comparison.plans] == ["interleaved"]
    assert words_of(comparison).startswith("This run uses interleaved placement. Pinned is not possible: ")
    assert "raise parallel.ep" in words_of(comparison)


def test_another_pinned_placement_is_compared_by_name() -> None:
    of = (even(4, 0, "text"), even(4, 4, "image"))
    placement = make_placement(
        PinnedSection.model_validate({"groups": {"text": {"ranks": (0,)}, "image": {"ranks": (1, 2, 3)}}}),
        of,
        num_ranks=4,
        token_mix={},
    )
    words = " ".join(render(compare(of, 4, {}), placement, {}, policy="pinned").split())
    assert "than pinned with ranks for this mix; its busiest rank has 100.0% more work" in words
    assert "It sends " in words
