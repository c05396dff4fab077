"""Statistics and verdicts of experiments equal numbers computed by hand."""

import math
from typing import Any

import numpy as np
import pytest

from research.experiments.study import Study
from research.experiments.verdicts import at_equal_cost, cost_to_reach, judge, log_eta, numbers, on_lines, paired
from tests.support.messages import refused

T_095_4 = 2.131846786  # Student's t for one-sided 95 % and 4 degrees of freedom, from tables
T_0975_4 = 2.776445105  # one-sided 97.5 %


def test_bounds_of_five_pairs_are_those_of_the_table() -> None:
    # The mean is 3; the squared deviations sum to 4 + 1 + 0 + 1 + 4 = 10, so s^2 = 10 / 4 and s^2 / 5 = 0.5.
    found = paired([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.n, found.mean) == (5, 3.0)
    assert found.deviation == pytest.approx(math.sqrt(2.5))
    assert found.upper == pytest.approx(3.0 + T_095_4 * math.sqrt(0.5), rel=1e-9)
    assert found.lower == pytest.approx(3.0 - T_095_4 * math.sqrt(0.5), rel=1e-9)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_bound_without_two_finite_pairs(values: list[float]) -> None:
    with refused(ValueError):
        paired(values)


def test_lines_between_points_and_a_little_beyond() -> None:
    points = [(2.0, 3.0), (1.5, 4.0), (1.75, 3.2)]
    assert on_lines(points, 1.6, reach=0.1) == pytest.approx(4.0 - 0.8 * 0.4)
    assert on_lines(points, 1.75, reach=0.0) == pytest.approx(3.2)
    assert on_lines(points, 1.45, reach=0.1) == pytest.approx(4.0 + 0.8 * 0.2)  # the first line extends to the left
    assert on_lines(points, 1.39, reach=0.1) is None
    assert on_lines(points, 2.11, reach=0.1) is None
    assert on_lines([(1.5, 4.0), (1.5, 3.0)], 1.5, reach=0.1) is None
    assert on_lines([(1.5, 4.0)], 1.5, reach=0.1) is None


def test_eta_by_hand() -> None:
    dense = [(1.0, 4.0), (10.0, 3.0), (100.0, 2.0)]
    # The loss 2 lies half way between 3 and 1, so `sparse` reaches it at cost 10^0.5 (log axis), and eta = 100 / 10^0.5.
    sparse = [(1.0, 3.0), (10.0, 1.0)]
    assert cost_to_reach(sparse, 2.0) == pytest.approx(10**0.5)
    assert log_eta(sparse, dense) == pytest.approx(math.log(100 / 10**0.5))
    # `late` never reaches the loss 2.0. It reaches its last loss, 2.5, at cost 100, and `dense` reaches 2.5 at 10^1.5.
    late = [(1.0, 5.0), (100.0, 2.5)]
    assert log_eta(late, dense) == pytest.approx(math.log(10**1.5 / 100))
    assert log_eta(dense, dense) == pytest.approx(0.0)
    assert log_eta([], dense) is None
    # A curve whose first point is below the loss does not show when the run reached that loss.
    assert cost_to_reach([(1.0, 1.5), (2.0, 1.0)], 2.0) is None
    assert cost_to_reach([(1.0, 2.0), (2.0, 1.0)], 2.0) == 1.0
    assert log_eta([(1.0, 1.5), (2.0, 1.0)], dense) is None
    assert log_eta([(0.5, 5.0)], dense) is None


@pytest.mark.parametrize(("loss", "eta"), [("heldout", 10.0), ("training", 100.0)])
def test_eta_is_of_the_loss_that_the_rule_names(loss: str, eta: float) -> None:
    """Arm b reaches a's last held-out loss, 2, at cost 10, and a's last training loss, 1, at cost 1. Arm a costs 100."""

    def curve(heldout: list[float], training: list[float]) -> list[dict[str, Any]]:
        return [
            {"flops": cost, "loss": {"all": held}, "training": {"all": trained}}
            for cost, held, trained in zip((1.0, 10.0, 100.0), heldout, training, strict=True)
        ]

    curves = {"a": curve([4.0, 3.0, 2.0], [3.0, 2.0, 1.0]), "b": curve([3.0, 2.0, 1.0], [1.0, 0.5, 0.2])}
    value = {"eta": "b", "of": "a", "part": "all", "loss": loss}
    rule = {"claim": "", "lower": {"constant": 0.0}, "higher": value}
    records: dict[Any, Any] = {(arm, seed): {"curve": curves[arm]} for arm in curves for seed in range(1, 6)}
    (verdict,) = judge(study_of([rule]), records)
    assert verdict.paired is not None
    assert verdict.paired.mean == pytest.approx(-math.log(eta))
    for each in (*curves["a"], *curves["b"]):
        del each["training"]
    assert (judge(study_of([rule]), records)[0].outcome == "not testable here") == (loss == "training")


def study_of(rules: list[dict], **more: Any) -> Study:
    arm = {"about": "", "seeds": "decisive"}
    values = {
        "name": "planted", "question": "", "base": "none", "seeds": {"decisive": [1, 2, 3, 4, 5], "other": [1, 2]},
        "pilot": {"seeds": [9]}, "arms": {"a": arm, "b": arm, "c": arm}, "rules": rules, **more,
    }  # fmt: skip
    return Study.model_validate(values, strict=False)


def records_of(**losses: list[float]) -> dict:
    return {(arm, seed): {"loss": {"all": loss}} for arm, five in losses.items() for seed, loss in enumerate(five, 1)}


NOT_WORSE = {"claim": "", "lower": {"arm": "a", "metric": "loss.all"}, "higher": {"arm": "b", "metric": "loss.all"}}


@pytest.mark.parametrize(
    ("shift", "margin", "outcome"),
    [
        (0.0, 0.02, "pass"),
        (0.0199, 0.02, "pass"),
        (0.02, 0.02, "fail"),
        (0.1, 0.02, "fail"),
        (-0.01, 0.0, "pass"),
        (0.0, 0.0, "fail"),
    ],
)
def test_planted_differences_pass_below_the_margin_alone(shift: float, margin: float, outcome: str) -> None:
    """All differences are equal, so their upper bound is their mean. A rule fails if the bound equals the margin."""
    base = [1.0, 2.0, 0.5, 4.0, 8.0]
    records = records_of(a=[loss + shift for loss in base], b=base)
    # In binary, loss + 0.02 - loss is not exactly 0.02, so the case at the margin uses exact numbers.
    if shift == margin:
        records = records_of(a=[shift] * 5, b=[0.0] * 5)
    assert judge(study_of([{**NOT_WORSE, "margin": margin}]), records)[0].outcome == outcome


def test_bounds_of_seeds_that_scatter() -> None:
    """The mean difference is 0, and s^2 = 2 (0.0081 + 0.0025) / 4 = 0.0053. Corrected bounds hold for all rules at once."""
    records = records_of(a=[-0.09, 0.09, -0.05, 0.05, 0.0], b=[0.0] * 5)
    rules = [{**NOT_WORSE, "margin": 0.02}, {**NOT_WORSE, "margin": 0.02, "by": "mean"}]
    for corrected, t in ((False, T_095_4), (True, T_0975_4)):
        by_bound, by_mean = judge(study_of(rules, corrected=corrected), records)
        assert (by_bound.outcome, by_mean.outcome) == ("fail", "pass")
        assert by_bound.paired is not None
        assert by_bound.paired.mean == pytest.approx(0.0)
        assert by_bound.paired.upper == pytest.approx(t * math.sqrt(0.0053 / 5), rel=1e-6)


def test_a_missing_run_is_not_testable_and_named() -> None:
    records = records_of(a=[1.0] * 5, b=[1.0] * 4)
    verdict = judge(study_of([NOT_WORSE]), records)[0]
    assert verdict.outcome == "not testable here"
    assert "b seed 5" in verdict.reason


def test_a_load_out_of_reach_is_not_testable() -> None:
    value = {"through": ["b", "c"], "x": "load.all", "y": "loss.all", "at": "a", "reach": 0.1}
    rule = {"claim": "", "lower": {"arm": "a", "metric": "loss.all"}, "higher": value}
    records = {
        (arm, seed): {"loss": {"all": loss}, "load": {"all": load}}
        for arm, loss, load in (("a", 1.0, 1.6), ("b", 1.2, 1.5), ("c", 1.1, 1.75))
        for seed in range(1, 6)
    }
    verdict = judge(study_of([rule]), records)[0]
    assert verdict.outcome == "pass"
    assert verdict.paired is not None
    assert verdict.paired.mean == pytest.approx(1.0 - (1.2 - 0.1 * 0.1 / 0.25))
    records["a", 3]["load"]["all"] = 1.2
    verdict = judge(study_of([rule]), records)[0]
    assert verdict.outcome == "not testable here"
    assert "seed 3" in verdict.reason


def test_a_sum_of_records_by_hand() -> None:
    """Half of the sum of b and c is 0.5 x 1 + 0.5 x 3 = 2, which lies below a = 2.5 and above a = 1.5."""
    half = [{"arm": arm, "metric": "loss.all", "times": 0.5} for arm in ("b", "c")]
    rule = {"claim": "", "lower": {"sum": half}, "higher": {"arm": "a", "metric": "loss.all"}}
    for a, outcome in ((2.5, "pass"), (1.5, "fail")):
        verdict = judge(study_of([rule]), records_of(a=[a] * 5, b=[1.0] * 5, c=[3.0] * 5))[0]
        assert verdict.outcome == outcome
        assert verdict.paired is not None
        assert verdict.paired.mean == pytest.approx(2.0 - a)
    assert "c seed 2" in judge(study_of([rule]), records_of(a=[1.0] * 5, b=[1.0] * 5, c=[1.0]))[0].reason


def test_a_gate_that_was_not_passed_leaves_nothing_to_judge() -> None:
    study = study_of([NOT_WORSE]).model_copy(update={"not_testable": "the gap was 1 point"})
    verdict = judge(study, records_of(a=[1.0] * 5, b=[2.0] * 5))[0]
    assert (verdict.outcome, verdict.reason) == ("not testable here", "the gap was 1 point")
    assert verdict.paired is not None
    assert verdict.paired.mean == pytest.approx(-1.0)
    assert numbers(verdict).startswith("-1.0000 [-1.0000, -1.0000], n = 5")


GATE = {
    "claim": "c is 0.1 below b",
    "lower": {"arm": "c", "metric": "loss.all"},
    "higher": {"arm": "b", "metric": "loss.all"},
}


@pytest.mark.parametrize(("c", "outcome"), [(1.85, "pass"), (1.95, "not testable here")])
def test_a_gate_is_measured_before_rules_are_judged(c: float, outcome: str) -> None:
    study = study_of([NOT_WORSE], gates=[{**GATE, "margin": -0.1}])
    records = records_of(a=[1.0] * 5, b=[2.0] * 5, c=[c] * 5)
    (verdict,) = judge(study, records)
    assert verdict.outcome == outcome
    if outcome != "pass":
        assert verdict.reason.startswith("gate not held: c is 0.1 below b -0.0500 [-0.0500, -0.0500], n = 5")
    del records["b", 4]
    assert judge(study, records)[0].reason.startswith("gate not judged: c is 0.1 below b (no record yet of b seed 4")


def test_distance_at_equal_cost_by_hand() -> None:
    dense = np.array([[1.0, 10.0, 100.0], [4.0, 3.0, 2.0]])
    sparse = np.array([[0.5, 10**0.5, 100.5, 110.0], [9.0, 3.0, 2.5, 1.0]])
    # At cost 10^0.5 `dense` has loss 3.5, half way from 4 to 3. 100.5 counts as its end; 0.5 and 110 are outside.
    np.testing.assert_allclose(at_equal_cost(sparse, dense), [sparse[0], [np.nan, -0.5, 0.5, np.nan]])
