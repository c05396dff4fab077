"""The Triton kernel for the router's choice gives the same choices, weights, sums and gradients as torch's router."""

import pytest
import torch

from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.kernels.triton_kernels import TRITON
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from tests.support.cover import full

D = 5
ONE = (ExpertGroup("all", 6, 0, 3, 8, 0, ("text",)),)
NULLS = (ExpertGroup("text", 4, 2, 3, 8, 0, ("text",)), ExpertGroup("image", 3, 1, 2, 8, 4, ("image",)))
WIDE = (ExpertGroup("all", 70, 8, 10, 8, 0, ("text",)),)
# 76 tokens are more than one block
TOKENS = {"none": [], "one": [0], "padding alone": [-1] * 3, "mixed": [0, -1, 0, 0] * 19}


def results(routing: Routing, inputs: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Returns the integer results, the float results, and the gradients of the float results along fixed directions."""
    counts, pairs = routing.counts, routing.assignments
    floats = [pairs.weight_N, routing.aux.prob_LC, routing.aux.log_z_squared_LG]
    directions = [torch.linspace(-1, 2, each.numel()).view_as(each).cos() for each in floats]
    gradients = torch.autograd.grad(floats, inputs, directions)
    integers = [pairs.token_N, pairs.expert_N, counts.choices_LC, counts.tokens_LG, counts.dropped_LE]
    return integers, [*floats, counts.entropy_LG, *gradients]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    ("groups", "normalise"),
    [
        (ONE, "none"), full(ONE, "true_chosen"), full(ONE, "all_chosen"), (NULLS, "none"), (NULLS, "true_chosen"),
        full(NULLS, "all_chosen"), (WIDE, "none"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_one_kernel_routes_as_torch(groups: tuple[ExpertGroup, ...], normalise: str, tokens: str) -> None:
    group_T = torch.tensor(TOKENS[tokens], dtype=torch.int64)
    if len(groups) > 1 and len(group_T) > 3:
        group_T[1::3] = 1
    torch.manual_seed(0)
    routers = [
        TopKRouter(RouterContext(D, groups, kernels=each), normalise=normalise, scale=1.5) for each in (TRITON, TORCH)
    ]  # pyright: ignore
    for parameter in routers[0].parameters():
        torch.nn.init.normal_(parameter)
    routers[1].load_state_dict(routers[0].state_dict())
    h_TD = torch.randn(len(group_T), D, requires_grad=True)
    cache = RoutingCache()
    ours, theirs = routers[0](h_TD, group_T, cache), routers[1](h_TD, group_T)
    got = results(ours, [h_TD, *routers[0].parameters()])
    wanted = results(theirs, [h_TD, *routers[1].parameters()])
    for mine, other in zip(got[0], wanted[0], strict=True):
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-5, atol=1e-5)
    again = results(routers[0](h_TD, group_T, cache), [h_TD, *routers[0].parameters()])
    for mine, other in zip([*got[0], *got[1]], [*again[0], *again[1]], strict=True):
        assert torch.equal(mine, other), "a recomputation keeps choices and bits"


def test_of_equal_logits_true_experts_win() -> None:
    router = TopKRouter(RouterContext(D, NULLS, kernels=TRITON))
    for parameter in router.parameters():
        torch.nn.init.ones_(parameter)
    routing = router(torch.ones(2, D), torch.tensor([0, 1]))
    assert routing.assignments.expert_N.tolist() == [0, 1, 2, 4, 5, -1]


def test_a_sum_without_a_loss_needs_no_gradient() -> None:
    gradients = []
    for kernels in (TRITON, TORCH):
        torch.manual_seed(0)
        router, h_TD = TopKRouter(RouterContext(D, NULLS, kernels=kernels)), torch.randn(7, D, requires_grad=True)
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        router(h_TD, torch.tensor([0, 0, 1, 0, -1, 1, 0])).assignments.weight_N.square().sum().backward()
        gradients.append(h_TD.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("normalise", ["none", "true_chosen", "all_chosen"])
def test_replayed_choices_that_would_not_win(normalise: str) -> None:
    group_T = torch.tensor(TOKENS["mixed"])
    group_T[1::3] = 1
    torch.manual_seed(0)
    h_TD = 3.0 * torch.randn(len(group_T), D, requires_grad=True)
    worst_TK = torch.zeros(len(group_T), 3, dtype=torch.int64)  # columns: text 0 to 3, 7, 8; image 4 to 6, 9
    found = []
    for kernels in (TORCH, TRITON):
        torch.manual_seed(1)
        router = TopKRouter(RouterContext(D, NULLS, kernels=kernels), normalise=normalise)  # pyright: ignore[reportArgumentType]
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        if kernels is TORCH:
            outside_TC = router.group_of_column_C != group_T[:, None]
            worst_TK = router._logits(h_TD).masked_fill(outside_TC, float("inf")).argsort(1)[:, :3]
        routing = router(h_TD, group_T, RoutingCache(choice_TK=worst_TK))
        found.append(results(routing, [h_TD, *router.parameters()]))
        taken = routing.assignments.expert_N >= 0
        assert torch.equal(routing.assignments.expert_N[taken], worst_TK.flatten()[taken])
        assert (routing.assignments.weight_N[taken] > 0).all()
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


def test_a_selection_bias_uses_torch() -> None:
    biased = TopKRouter(RouterContext(D, NULLS, kernels=TRITON), selection_bias=True)
    torch.manual_seed(0)
    for parameter in biased.parameters():
        torch.nn.init.normal_(parameter)
    assert biased(torch.randn(4, D), torch.zeros(4, dtype=torch.int64)).chosen is None


def test_the_choices_that_a_trace_keeps_change_no_bit() -> None:
    found = []
    for kernels, keep in ((TRITON, True), (TRITON, False), (TORCH, True)):
        torch.manual_seed(0)
        router = TopKRouter(RouterContext(D, NULLS, kernels=kernels))
        for parameter in router.parameters():
            torch.nn.init.normal_(parameter)
        found.append(router(torch.randn(6, D), torch.tensor([0, 1, -1, 0, 0, 1]), RoutingCache(keep_choices=keep)))
    kept, plain, torchs = found
    assert torch.equal(kept.assignments.weight_N, plain.assignments.weight_N)
    assert plain.chosen is None
    assert torch.equal(kept.chosen.column_TK, torchs.chosen.column_TK)
    # recorded weights are float16
    torch.testing.assert_close(kept.chosen.weight_TK, torchs.chosen.weight_TK, rtol=2e-3, atol=0)
