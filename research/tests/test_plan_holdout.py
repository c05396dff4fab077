"""Tests the layouts, the fit and the verdict of research.plan_holdout, on seconds computed from made-up machine factors."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moe_dist.config.load import load_config, rule_violations
from moe_dist.errors import DataError
from moe_dist.plan.estimate import LayoutEstimator
from moe_dist.plan.policies import expert_groups, make_placement
from moe_dist.plan.rates import LinkSection, Rates, ScaleSection
from moe_dist.plan.rows import Expected
from research.plan_holdout import LAYOUTS, Clock, Observed, Predicted, judged, kendall, peak_of, seconds_of
from tests.support.messages import refused
from tests.unit.plan.test_step_model import RATES

LINK = LinkSection(ranks=8, latency=1e-4, bytes_per_second=1e9)
MACHINE = RATES.model_copy(
    update={"ranks_per_node": 8, "copy_rate": 1e9, "launch": 1e-5, "inside": (LINK,), "between": LINK, "cores": 8}
)
TRUTH = ScaleSection(dense=1.7, experts=2.5, launch=1.3, recompute=1.6, exchange=0.6, step=0.2)


class Expectations(Predicted):
    def __init__(self, runs: Sequence[Observed], rates: Rates) -> None:
        self._runs = [(run, LayoutEstimator(rates, Expected({}), {}, 1e12)) for run in runs]


def runs() -> list[Observed]:
    made = []
    for layout in LAYOUTS:
        config = load_config(layout.config, layout.overrides)
        assert not rule_violations(config), layout
        groups = expert_groups(config.model.moe)
        placement = make_placement(config.placement, groups, num_ranks=config.parallel.ep, token_mix={})
        unread: Any = None
        made.append(Observed(layout.name, config, placement, unread, {}, {}, {"cpu": 0.0, "wall": 0.0}, 10, 10, 0.0))
    estimates = Expectations(made, MACHINE)(MACHINE.model_copy(update={"scale": TRUTH}))
    clocks: tuple[Clock, ...] = ("cpu", "wall")
    seconds = {clock: seconds_of(estimates, clock) for clock in clocks}
    return [
        replace(run, seconds={clock: float(seconds[clock][i]) for clock in clocks}, memory=peak_of(estimates[i]))
        for i, run in enumerate(made)
    ]


def test_kendall_is_that_of_all_pairs() -> None:
    one, other = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0])
    assert kendall(one, one) == 1.0
    assert kendall(one, -one) == -1.0
    assert kendall(one, other) == pytest.approx((5 - 1) / 6)


@pytest.mark.full
def test_a_machine_with_other_factors_is_predicted_and_noise_and_lost_bytes_are_not_hidden() -> None:
    made = runs()
    assert len(made) >= 24
    kept, lines = judged(made, MACHINE, Expectations)
    assert kept, lines
    assert [line.partition(":")[0] for line in lines[:8]] == ["pass"] * 8
    noisy = [
        replace(run, seconds={"cpu": run.seconds["cpu"], "wall": run.seconds["wall"] * (1.6 if number % 4 == 1 else 1.0)})
        for number, run in enumerate(made)
    ]
    noisy[3] = replace(noisy[3], replayed=11, memory=1.1 * noisy[3].memory)
    kept, lines = judged(noisy, MACHINE, Expectations)
    assert not kept
    assert lines[0].startswith("FAIL")
    failed = {line.split(":")[1].strip() for line in lines if line.startswith("FAIL")}
    assert failed >= {"wall", "memory"}
    assert any(line.startswith("FAIL: wall: worst error 0.") for line in lines)
    assert any(
        line.startswith("FAIL: bytes differ in ['placement.policy=interleaved ep=2 recompute=none']") for line in lines
    )
    assert "cpu" not in failed
    with refused(DataError, "3 layouts"):
        judged(made[:3], MACHINE, Expectations)
