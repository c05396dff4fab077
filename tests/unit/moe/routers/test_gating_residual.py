"""Routers with gating residuals (a map of the previous layer's logits) have the same values and gradients as a loop
over tokens."""

import pytest
import torch
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.gating_residual import GatingResidualRouter
from moe_dist.moe.routing.types import Routing, RoutingCache, group_columns
from moe_dist.placement.placement import ExpertGroup
from tests.reference.gating_residual import chained_logits, top_k_weights
from tests.support.cover import full
from tests.unit.moe.routers.test_contract import tensors_of, weights_of

T, D, LAYERS = 40, 6, 3
# The groups have different sizes and all kinds of columns. A group's columns are not consecutive among all columns.
TEXT = ExpertGroup("text", 5, 3, 3, 8, 0, ("text",), num_constant=1)
IMAGE = ExpertGroup("image", 3, 1, 2, 8, 5, ("image",), num_identity=2)
ALL = ExpertGroup("all", 4, 2, 2, 8, 0, ("text", "image"))


def made(groups: tuple[ExpertGroup, ...], *, bias: bool = False) -> list[GatingResidualRouter]:
    rng = torch.Generator().manual_seed(0)
    routers = [
        GatingResidualRouter(RouterContext(D, groups, place=place), selection_bias=bias).double() for place in range(LAYERS)
    ]
    with torch.no_grad():
        for router in routers:
            for name, tensor in [*router.named_parameters(), *router.named_buffers()]:
                if not tensor.is_floating_point():
                    continue
                drawn = torch.randn(tensor.shape, dtype=torch.double, generator=rng)
                tensor.copy_(0.1 * drawn if name.endswith("bias") else drawn)
    return routers


def inputs(num_groups: int, count: int = T) -> tuple[list[Tensor], Tensor]:
    """Returns the router's input in each layer, and each token's group, or -1 for padding."""
    rng = torch.Generator().manual_seed(1)
    layers = [torch.randn(count, D, dtype=torch.double, generator=rng).requires_grad_() for _ in range(LAYERS)]
    return layers, torch.randint(-1, num_groups, (count,), generator=rng)


def chained(routers: list[GatingResidualRouter], layers: list[Tensor], group_T: Tensor) -> list[Routing]:
    found: list[Routing] = []
    for router, h_TD in zip(routers, layers, strict=True):
        found.append(router(h_TD, group_T, RoutingCache(previous_TC=found[-1].logits_TC if found else None)))
    return found


def slow_tables(routers: list[GatingResidualRouter], layers: list[Tensor], group_T: Tensor) -> list[Tensor]:
    groups = routers[0].groups
    owner = torch.tensor(group_columns(groups))
    tables = [torch.zeros(len(group_T), len(owner), dtype=torch.double) for _ in routers]
    for token, index in enumerate(group_T.tolist()):
        if index < 0:
            continue
        group, columns = groups[index], (owner == index).nonzero()[:, 0]
        gates = [tensors_of(router, group) for router in routers]
        rows, residuals = [each["rows"] for each in gates], [each.get("residual") for each in gates]
        logits = chained_logits([h_TD[token] for h_TD in layers], rows, residuals)
        null = range(group.num_experts, group.num_experts + group.num_null)
        for layer, each in enumerate(gates):
            weights = top_k_weights(logits[layer], top_k=group.top_k, null=null, bias_C=each.get("bias"))
            for column, weight in weights.items():
                tables[layer] = tables[layer].index_put((torch.tensor(token), columns[column]), weight)
    return tables


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [(TEXT, IMAGE), full((IMAGE, TEXT)), (ALL,)], ids=lambda groups: groups[0].name)
def test_equals_the_loop_in_values_and_gradients(groups: tuple[ExpertGroup, ...], bias: bool) -> None:
    routers = made(groups, bias=bias)
    layers, group_T = inputs(len(groups))
    fast = [weights_of(*pair, T) for pair in zip(routers, chained(routers, layers, group_T), strict=True)]
    slow = slow_tables(routers, layers, group_T)
    torch.testing.assert_close(fast, slow, rtol=0, atol=1e-12)
    over = [*layers, *(parameter for router in routers for parameter in router.parameters())]
    score_TC = torch.randn(fast[-1].shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    # Gradients of the last layer's weights reach the first layer's rows through two residuals.
    ours, theirs = (
        torch.autograd.grad((each[-1] * score_TC).sum(), over, allow_unused=True, materialize_grads=True)
        for each in (fast, slow)
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11)
    assert ours[0].abs().max() > 1e-3


def test_only_later_layers_have_a_residual() -> None:
    first, second, _ = made((TEXT, IMAGE))
    assert not [name for name, _ in first.named_parameters() if name.endswith("residual")]
    shapes = {name: tuple(each.shape) for name, each in second.named_parameters() if name.endswith("residual")}
    assert sorted(shapes.values()) == [(6, 6), (9, 9)]


def test_no_token_and_padding_alone() -> None:
    routers = made((TEXT, IMAGE))
    for count in (0, 3):
        layers, _ = inputs(2, count)
        found = chained(routers, layers, torch.full((count,), -1))
        assert all(len(routing.assignments.taken().token_N) == 0 for routing in found)
        assert all(routing.logits_TC is not None and routing.logits_TC.shape == (count, 15) for routing in found)
