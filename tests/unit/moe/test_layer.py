"""With null, identity and constant experts, a selection bias and a capacity, the layer has the same values and
gradients as the oracle's loops, under every recompute policy.
"""

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.capacity import Capacity
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.types import RoutingRequest
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup
from tests.reference.layer import ReferenceWeights, moe_forward
from tests.support.one_rank_layer import one_rank_layer

D = 6
TEXT = ExpertGroup("text", 4, 2, 4, 5, 0, ("text",), num_identity=2, num_constant=3)
IMAGE = ExpertGroup("image", 3, 1, 2, 7, 4, ("image",), num_constant=1)
PLAIN = ExpertGroup("text", 4, 2, 3, 5, 0, ("text",))
COPIES = ExpertGroup("image", 3, 0, 3, 7, 4, ("image",), num_identity=2)
CASES = {"all kinds": (TEXT, IMAGE), "no constants": (PLAIN, COPIES)}


def make_layer(
    groups: Sequence[ExpertGroup],
    *,
    recompute: str = "none",
    capacity: Capacity | None = None,
    pair_budget: int | None = None,
    **options: Any,
) -> MoELayer:
    torch.manual_seed(0)
    router = TopKRouter(RouterContext(D, groups, capacity=capacity), **options)
    return one_rank_layer(router, D, recompute=recompute, pair_budget=pair_budget).double()


def reference_weights(layer: MoELayer, groups: Sequence[ExpertGroup]) -> dict[str, ReferenceWeights]:
    weights = {}
    for group in groups:
        gate, stack = (
            layer.router.get_submodule(group_module(group.name)),
            layer.experts.get_submodule(group_module(group.name)),
        )
        constants = (
            layer.free.get_submodule(group_module(group.name)) if group.num_constant and layer.free is not None else None
        )
        rows = {kind: getattr(gate, kind, None) for kind in ("true", "null", "identity", "constant", "bias")}
        stacks: dict[str, Any] = {name: getattr(stack, name) for name in ("gate", "up", "down")}
        constant: dict[str, Any] = {"vector": constants.vector, "mix": constants.gate} if constants is not None else {}
        weights[group.name] = ReferenceWeights(**rows, **stacks, **constant)  # pyright: ignore[reportArgumentType]
    return weights


def assert_equals_the_oracle(layer: MoELayer, h_TD: Tensor, group_T: Tensor, expected: Tensor) -> None:
    y_TD, _ = layer(h_TD, group_T)
    torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(y_TD)
    inputs = [h_TD, *layer.parameters()]
    ours = torch.autograd.grad((y_TD * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs, allow_unused=True)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if wanted is None else wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("case", "normalise"), list(product(CASES, ("true_chosen", "all_chosen", "true_all", "none"))))
@pytest.mark.parametrize("selection_bias", [False, True])
def test_free_experts_and_bias(case: str, normalise: str, selection_bias: bool) -> None:
    groups = CASES[case]
    layer = make_layer(groups, normalise=normalise, selection_bias=selection_bias, scale=1.5)
    h_TD, group_T = torch.randn(30, D, dtype=torch.double, requires_grad=True), torch.randint(-1, 2, (30,))
    weights = reference_weights(layer, groups)
    expected = moe_forward(h_TD, group_T.tolist(), groups, weights, normalise=normalise, scale=1.5)
    assert_equals_the_oracle(layer, h_TD, group_T, expected)


@pytest.mark.parametrize("pair_budget", [None, 1, 7, 1000])
@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_recompute_and_chunks_of_pairs(recompute: str, pair_budget: int | None) -> None:
    groups = CASES["no constants"]
    layer = make_layer(groups, recompute=recompute, pair_budget=pair_budget)
    h_TD, group_T = torch.randn(30, D, dtype=torch.double, requires_grad=True), torch.randint(-1, 2, (30,))
    expected = moe_forward(h_TD, group_T.tolist(), groups, reference_weights(layer, groups))
    assert_equals_the_oracle(layer, h_TD, group_T, expected)


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
@pytest.mark.parametrize(
    ("factor", "drop"), [(0.5, "probability"), (0.5, "position"), (1.0, "probability"), (9.0, "position")]
)
def test_capacity(factor: float, drop: str, recompute: str) -> None:
    groups = CASES["all kinds"]
    layer = make_layer(groups, recompute=recompute, capacity=Capacity(factor, drop))  # pyright: ignore[reportArgumentType]
    h_TD = torch.randn(40, D, dtype=torch.double)
    h_TD[5:15] = h_TD[4]  # the same token eleven times, so that pairs tie
    h_TD.requires_grad_()
    group_T = torch.randint(-1, 2, (40,))
    weights = reference_weights(layer, groups)
    expected = moe_forward(h_TD, group_T.tolist(), groups, weights, capacity=(factor, drop))
    assert_equals_the_oracle(layer, h_TD, group_T, expected)
    _, report = layer(h_TD, group_T)
    dropped = int(report.counts.dropped_LE.sum())
    assert (dropped > 0) == (factor < 9)
    assert report.sent.pairs == int(report.counts.choices_LC[0][:7].sum()) - dropped


def test_evaluation_drops_nothing() -> None:
    groups = CASES["all kinds"]
    layer = make_layer(groups, capacity=Capacity(0.25)).eval()
    h_TD, group_T = torch.randn(40, D, dtype=torch.double, requires_grad=True), torch.randint(-1, 2, (40,))
    expected = moe_forward(h_TD, group_T.tolist(), groups, reference_weights(layer, groups))
    assert_equals_the_oracle(layer, h_TD, group_T, expected)
    assert (layer(h_TD, group_T)[1].counts.dropped_LE == 0).all()


def test_free_choices_are_no_pairs() -> None:
    """Tokens that choose only zero-computation experts have no pairs, and no rows are sent."""
    group = ExpertGroup("text", 3, 1, 2, 5, 0, ("text",), num_identity=1, num_constant=1)
    layer = make_layer((group,))
    gate = layer.router.get_submodule("group:text")
    with torch.no_grad():
        for kind, value in (("true", -5.0), ("null", -5.0), ("identity", 5.0), ("constant", 5.0)):
            getattr(gate, kind).fill_(value)
    y_TD, report = layer(torch.ones(6, D, dtype=torch.double), torch.zeros(6, dtype=torch.int64))
    assert report.sent == SentCounts(0, 0, 0)
    assert report.counts.choices_LC[0].tolist() == [0, 0, 0, 0, 6, 6]
    assert (y_TD != 0).all()


def test_ablation_zeroes_the_output_and_nothing_else() -> None:
    layer = make_layer(CASES["all kinds"])
    h_TD, group_T = torch.randn(10, D, dtype=torch.double), torch.randint(0, 2, (10,))
    _, before = layer(h_TD, group_T)
    y_TD, after = layer(h_TD, group_T, RoutingRequest(experts_off=True))
    assert (y_TD == 0).all()
    assert torch.equal(before.counts.choices_LC, after.counts.choices_LC)


def test_without_a_token_every_parameter_has_a_zero_gradient() -> None:
    layer = make_layer(CASES["all kinds"], capacity=Capacity(1.0), selection_bias=True)
    y_TD, report = layer(torch.randn(4, D, dtype=torch.double), torch.full((4,), -1))
    (y_TD.sum() + report.aux.prob_LC.sum() + report.aux.log_z_squared_LG.sum()).backward()
    assert (y_TD == 0).all()
    assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_the_routing_of_asked_tokens_leaves_by_value(recompute: str) -> None:
    """For the probed tokens the layer returns the softmax over their group's columns, with 0 in all other columns and with
    a gradient. Without probed tokens it returns None."""
    groups = CASES["all kinds"]
    layer = make_layer(groups, recompute=recompute)
    h_TD = torch.randn(12, D, dtype=torch.double, requires_grad=True)
    group_T, probe_tokens_A = torch.tensor([0, 1, -1, 0] * 3), torch.tensor([9, 0, 3])
    _, report = layer(h_TD, group_T, RoutingRequest(probe_tokens_A=probe_tokens_A))
    assert layer(h_TD, group_T)[1].prob_AC is None
    router = layer.router
    logits_AC = router._logits(layer.norm(h_TD))[probe_tokens_A]  # pyright: ignore
    inside_AC = router.group_of_column_C == group_T[probe_tokens_A][:, None]  # pyright: ignore
    expected_AC = torch.where(inside_AC, logits_AC.exp(), 0.0)
    expected_AC = expected_AC / expected_AC.sum(1, keepdim=True)
    torch.testing.assert_close(report.prob_AC, expected_AC)
    factor_AC = torch.rand_like(expected_AC)
    (ours,) = torch.autograd.grad((report.prob_AC * factor_AC).sum(), h_TD)
    (theirs,) = torch.autograd.grad((expected_AC * factor_AC).sum(), h_TD)
    torch.testing.assert_close(ours, theirs)
