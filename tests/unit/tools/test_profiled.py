"""Tests the share of a step in which no kernel runs."""

import pytest

from research.gpu_bench.profiled import Profiled, idle_share


def test_overlapping_kernels_count_once_and_gaps_are_idle() -> None:
    assert idle_share([(0.0, 4.0), (1.0, 2.0), (3.0, 5.0), (8.0, 10.0)]) == Profiled(4, pytest.approx(0.3))
    assert idle_share([(8.0, 10.0), (0.0, 8.0)]) == Profiled(2, 0.0)
    assert idle_share([]) == Profiled(0, 0.0)
