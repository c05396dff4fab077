"""Tests the share of a step in which no kernel runs, and rehearses measurements of steps on the CPU."""

import pytest

from research.gpu_bench.__main__ import MEASUREMENTS
from research.gpu_bench.profiled import Profiled, idle_share
from tests.integration.test_gpu_check import job, run  # noqa: F401
from tools.gpu_check.outcome import CheckJob


def test_overlapping_kernels_count_once_and_gaps_are_idle() -> None:
    assert idle_share([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 10.0)]) == Profiled(4, pytest.approx(0.3))
    assert [idle_share([(8.0, 10.0), (0.0, 8.0)]), idle_share([])] == [Profiled(2, 0.0), Profiled(0, 0.0)]


@pytest.mark.exhaustive
def test_measurements_of_steps_pass_their_rehearsal(job: CheckJob) -> None:  # noqa: F811
    checks = {name: MEASUREMENTS[name] for name in ("ceilings", "syncs", "exchanges", "preset", "long run")}
    assert {name: each.verdict for name, each in run(job, checks).items()} == dict.fromkeys(checks, "pass")
