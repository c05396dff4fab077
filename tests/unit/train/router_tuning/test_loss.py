"""The manifold term and its weights have the same values and gradients as loops over single numbers."""

import numpy as np
import pytest
import torch

from moe_dist.train.router_tuning.neighbours import neighbour_weights
from moe_dist.train.router_tuning.tuning import manifold_sum
from tests.support.manifold import manifold_sum_reference


@pytest.mark.parametrize(("samples", "neighbours"), [(4, 3), (1, 1), (3, 0)])
def test_the_term_is_the_sum_of_the_formula(samples: int, neighbours: int) -> None:
    torch.manual_seed(0)
    target_BKR = torch.rand(samples, neighbours, 5, dtype=torch.double, requires_grad=True)
    weight_BK = torch.rand(samples, neighbours, dtype=torch.double)
    weight_BK[0, 1:] = 0.0  # this sample has fewer neighbours
    values, gradients = [], []
    for term in (manifold_sum, manifold_sum_reference):
        r_BR = torch.rand(samples, 5, dtype=torch.double, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = term(r_BR, target_BKR, weight_BK)
        if neighbours:
            value.backward()
        values.append(value.item())
        gradients.append(r_BR.grad)
    assert values[0] == pytest.approx(values[1], rel=1e-12)
    if neighbours:
        torch.testing.assert_close(*gradients, rtol=1e-12, atol=0.0)
    assert target_BKR.grad is None, "r_j is a constant"


def test_far_neighbours_of_a_small_bandwidth_still_weigh_one() -> None:
    found = neighbour_weights(np.array([2.0, 2.0, 3.0]), 0.01)  # exp(-10000) underflows to 0
    np.testing.assert_allclose(found, [0.5, 0.5, 0.0], atol=1e-12)
    assert neighbour_weights(np.zeros(0), 1.0).shape == (0,)
