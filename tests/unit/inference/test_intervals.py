"""Wilson intervals equal scipy's. Bootstrap intervals agree with the normal approximation where it holds."""

import numpy as np
import pytest

from moe_dist.inference.multiple_choice import bootstrap_mean, wilson


@pytest.mark.parametrize(("right", "total"), [(0, 5), (5, 5), (1, 3), (17, 40), (431, 1000)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_wilson_is_scipys(right: int, total: int, confidence: float) -> None:
    from scipy.stats import binomtest  # 0.5 s, which each worker would need to collect this file

    expected = binomtest(right, total).proportion_ci(confidence, method="wilson")
    assert wilson(right, total, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_of_two_tasks_is_nearly_normal_and_seeded() -> None:
    right = [np.arange(400) < 100, np.arange(900) < 600]
    shares = np.array([each.mean() for each in right])
    error = np.sqrt((shares * (1 - shares) / [400, 900]).sum()) / 2
    low, high = bootstrap_mean(right, seed=1)
    assert (low + high) / 2 == pytest.approx(shares.mean(), abs=0.1 * error)
    assert (high - low) / 2 == pytest.approx(1.96 * error, rel=0.08)
    assert bootstrap_mean(right, seed=1) == (low, high) != bootstrap_mean(right, seed=2)
