"""Expert choice with Triton kernels gives the same choices, weights, sums and gradients as with torch's operations."""

from itertools import product
from typing import Any

import pytest
import torch

from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.moe.kernels.triton_kernels import TRITON
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.expert_choice import ExpertChoiceRouter
from moe_dist.moe.routing.types import GlobalBatchInfo, Routing, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from tests.support.cover import full_unless

D = 5
TWO = (ExpertGroup("text", 4, 0, 1, 8, 0, ("text",)), ExpertGroup("image", 3, 0, 2, 8, 4, ("image",)))
MANY = (ExpertGroup("all", 300, 0, 3, 8, 0, ("text",)),)  # so many experts that a block has only two tokens
TOKENS = {"none": [], "one": [0], "padding alone": [-1] * 3, "mixed": [0, -1, 0, 1, 1] * 61}  # "mixed" has several blocks


def router_of(kernels: Any, groups: tuple[ExpertGroup, ...], **options: Any) -> ExpertChoiceRouter:
    torch.manual_seed(0)
    router = ExpertChoiceRouter(RouterContext(D, groups, known_counts=True, kernels=kernels), causal="threshold", **options)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter)
    for gate in router.gates():
        gate.threshold.fill_(0.4)
    return router


def same(got: Routing, wanted: Routing, h_TD: torch.Tensor, routers: list[ExpertChoiceRouter]) -> None:
    pairs, expected = got.assignments, wanted.assignments
    assert pairs.counts_WE == expected.counts_WE
    integers = [(pairs.token_N, expected.token_N), (pairs.expert_N, expected.expert_N)]
    names = ("choices_LC", "tokens_LG", "dropped_LE", "above_LE", "unrouted_LG")
    integers += [(getattr(got.counts, name), getattr(wanted.counts, name)) for name in names]
    for mine, other in integers:
        assert torch.equal(mine, other)
        assert mine.dtype == other.dtype
    floats = [(pairs.weight_N, expected.weight_N), (got.aux.prob_LC, wanted.aux.prob_LC)]
    floats += [(getattr(got.counts, name), getattr(wanted.counts, name)) for name in ("entropy_LG", "kth_score_LE")]
    floats.append((got.aux.log_z_squared_LG, wanted.aux.log_z_squared_LG))
    gradients = []
    for weight_N, router in zip((pairs.weight_N, expected.weight_N), routers, strict=True):
        direction = torch.linspace(-1, 2, weight_N.numel()).cos()
        gradients.append(torch.autograd.grad(weight_N, [h_TD, *router.parameters()], direction, materialize_grads=True))
    for mine, other in [*floats, *zip(*gradients, strict=True)]:
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


OPTIONS: dict[str, tuple[tuple[ExpertGroup, ...], dict[str, Any]]] = {
    "top-k": (TWO, {}),
    "all tokens": (TWO, {"capacity": 1.0}),
    "noise": (TWO, {"capacity": 0.3, "noise": 1.0}),
    "many experts": (MANY, {"capacity": 0.01}),
}


@pytest.mark.parametrize(
    ("training", "case", "tokens"),
    full_unless(
        lambda training, case, tokens: (
            tokens == ("one" if case == "many experts" else "mixed") and (training or case == "noise")
        ),
        product([True, False], OPTIONS, TOKENS),
    ),
)
def test_kernels_choose_as_torch(case: str, tokens: str, *, training: bool) -> None:
    groups, options = OPTIONS[case]
    group_T = torch.tensor(TOKENS[tokens], dtype=torch.int64).clamp_max(len(groups) - 1)
    members = tuple(int((group_T == index).sum()) for index in range(len(groups)))
    info = GlobalBatchInfo(3, 0, 0, (len(group_T),), (members,)) if training else None
    routers = [router_of(kernels, groups, **options).train(training) for kernels in (TRITON, TORCH)]
    h_TD = torch.randn(len(group_T), D, requires_grad=True)
    if len(group_T) > 3:
        h_TD.data[5:9] = h_TD.data[5]  # equal logits: the earlier token must win
    caches = [RoutingCache(batch_info=info) for _ in routers]
    routings = [router(h_TD, group_T, cache) for router, cache in zip(routers, caches, strict=True)]
    same(*routings, h_TD, routers)
    again = routers[0](h_TD, group_T, caches[0])  # a recomputation keeps the choice
    assert torch.equal(again.assignments.token_N, routings[0].assignments.token_N)


def test_a_float64_router_takes_torch() -> None:
    router = router_of(TRITON, TWO).double()
    info = GlobalBatchInfo(0, 0, 0, (4,), ((2, 2),))
    routing = router(torch.randn(4, D).double(), torch.tensor([0, 1, 0, 1]), RoutingCache(batch_info=info))
    assert routing.assignments.weight_N.dtype == torch.float64
