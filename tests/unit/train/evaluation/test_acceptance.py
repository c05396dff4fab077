"""Tests the checks at the end of a run on hand-made numbers."""

from typing import Any, get_args

import numpy as np

from moe_dist.config.schema import CheckName
from moe_dist.monitor.statistics import EvaluationResult
from moe_dist.placement.placement import ExpertGroup
from moe_dist.train.evaluation.acceptance import run_checks

ALL = get_args(CheckName)
GROUPS = (ExpertGroup("text", 2, 2, 2, 8, 0, ("text",)), ExpertGroup("image", 1, 0, 1, 8, 2, ("image",)))
BASELINES = {
    "text/unigram": 6.0, "text/left_bigram": 4.0,
    "image/unigram": 4.5, "image/left_bigram": 2.6,
    "image_no_filler/unigram": 6.0, "image_no_filler/left_bigram": 4.9,
}  # fmt: skip
GOOD = {"text": 5.0, "image": 2.59, "image_no_filler": 4.8}
# The columns are text/0, text/1, image/0, and text's two null experts. 10 text tokens made 20 choices.
CHOICES = np.array([[5, 5, 7, 6, 4]])
TOKENS = np.array([[10, 7]])
ROUTING: dict[str, Any] = {
    "choices_LC": CHOICES, "tokens_LG": TOKENS, "dropped_L": np.zeros(1), "groups": GROUPS, "skipped_steps": 0,
    "window": 100,
}  # fmt: skip


def passed(
    loss: dict[str, float], rise: float = 0.2, choices: np.ndarray = CHOICES, skipped: int = 0, dropped: int = 1
) -> dict[str, bool]:
    result = EvaluationResult(1, loss, {}, ablated_loss={name: value + rise + 1e-9 for name, value in loss.items()})
    routing = ROUTING | {"choices_LC": choices, "skipped_steps": skipped, "dropped_L": np.array([dropped])}
    checks = run_checks(ALL, result, BASELINES, **routing)
    return {check.name: check.passed for check in checks}


def test_a_good_run_passes_each_check() -> None:
    assert passed(GOOD) == dict.fromkeys(
        [
            "held-out text loss", "held-out image loss", "held-out image without filler loss",
            "experts matter to text", "experts matter to image", "no dead expert", "few dropped pairs",
            "null fraction of text", "no step skipped",
        ],
        True,
    )  # fmt: skip


def test_each_check_fails_on_its_own() -> None:
    def failed(**change: object) -> list[str]:
        return [name for name, ok in passed(**{"loss": GOOD, **change}).items() if not ok]  # pyright: ignore

    assert failed(loss={**GOOD, "text": 5.01}) == ["held-out text loss"]
    assert failed(loss={**GOOD, "image": 2.6}) == ["held-out image loss"]
    assert failed(loss={**GOOD, "image_no_filler": 4.81}) == ["held-out image without filler loss"]
    assert failed(rise=0.19) == ["experts matter to text", "experts matter to image"]
    assert failed(choices=np.array([[10, 0, 7, 6, 4]])) == ["no dead expert"]
    assert failed(choices=np.array([[5, 7, 7, 4, 4]])) == ["null fraction of text"]
    assert failed(dropped=2) == ["few dropped pairs"]  # 2 of 17 pairs
    assert failed(skipped=1) == ["no step skipped"]


def test_a_data_set_without_baselines_is_measured_by_its_routing_alone() -> None:
    result = EvaluationResult(1, GOOD, {})
    checks = run_checks(ALL, result, {}, **ROUTING)
    names = ["no dead expert", "few dropped pairs", "null fraction of text", "no step skipped"]
    assert [check.name for check in checks] == names


def test_a_controlled_load_moves_the_null_share_that_is_asked_for() -> None:
    """With k = 2 for text, a target of 1.4 true experts per token leaves 0.3 of the choices to null experts. The target
    1.0 of an even load leaves half of the choices."""
    result = EvaluationResult(1, GOOD, {})
    for nulls, load, good in (([3, 3], 1.4, True), ([3, 3], 1.0, False), ([5, 5], 1.4, False)):
        true = (20 - sum(nulls)) // 2
        routing = ROUTING | {"choices_LC": np.array([[true, true, 7, *nulls]])}
        checks = run_checks(ALL, result, {}, **routing, even_active={"text": load})
        assert {check.name: check.passed for check in checks}["null fraction of text"] == good
