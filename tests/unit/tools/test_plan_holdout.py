"""The hold-out: layouts, fit and verdict, on runs whose seconds are those of a machine with known factors."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_dist.config.load import load_config, rule_violations
from moe_dist.errors import DataError
from moe_dist.plan.estimate import Planner
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.rates import LinkSection, Rates, ScaleSection
from moe_dist.plan.rows import Expected
from tests.support.messages import refused
from tests.unit.plan.test_step_model import RATES
from tools.plan_holdout import COMMON, CONFIG, LAYOUTS, Observed, judged, kendall

LINK = LinkSection(ranks=8, latency=1e-4, bytes_per_second=1e9)
MACHINE = RATES.model_copy(update={"ranks_per_node": 8, "copy_rate": 1e9, "launch": 1e-5, "inside": (LINK,)})
TRUTH = ScaleSection(dense=1.7, experts=2.5, exchange=0.6, step=0.2)


def runs() -> list[Observed]:
    made = []
    for number, overrides in enumerate(LAYOUTS):
        config = load_config(CONFIG, [*COMMON, *overrides])
        assert not rule_violations(config), overrides
        unread: Any = None
        made.append(Observed(f"layout_{number:02d}", config, unread, 0.0, 10, 10))
    seconds = expected(made, MACHINE.model_copy(update={"scale": TRUTH}))
    return [replace(run, seconds=float(each)) for run, each in zip(made, seconds, strict=True)]


def expected(of: Any, rates: Rates) -> np.ndarray:
    found = []
    for run in of:
        groups = expert_groups(run.config.model.moe)
        placement = make_placement(run.config.placement, groups, num_ranks=run.config.parallel.ep, token_mix={})
        found.append(Planner(rates, Expected({}), {}, 1e12).estimate(run.config, placement).seconds)
    return np.array(found)


def test_kendall_is_that_of_all_pairs() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert kendall(one, one) == 1.0
    assert kendall(one, -one) == -1.0
    assert kendall(one, other) == pytest.approx((5 - 1) / 6)


def test_a_machine_with_other_factors_is_predicted_and_noise_and_lost_bytes_are_not_hidden() -> None:
    made = runs()
    assert len(made) == 24
    kept, lines = judged(made, MACHINE, expected)
    assert kept, lines
    assert [line.partition(":")[0] for line in lines[:4]] == ["pass"] * 4
    noisy = [replace(run, seconds=run.seconds * (1.6 if number % 4 == 1 else 1.0)) for number, run in enumerate(made)]
    noisy[3] = replace(noisy[3], replayed=11)
    kept, lines = judged(noisy, MACHINE, expected)
    assert not kept
    assert lines[0].startswith("FAIL")
    assert any(line.startswith("FAIL: bytes differ in ['layout_03']") for line in lines)
    assert any(line.startswith("FAIL: worst error 0.") for line in lines)
    with refused(DataError, "3 runs"):
        judged(made[:3], MACHINE, expected)
