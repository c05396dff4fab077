"""Every router in which tokens choose experts has the results of a loop over tokens, counts the chosen columns, ignores
padding, and repeats its choice in recomputation. Where tokens have different numbers of experts, a controller holds the
mean number. The other files of this folder test properties of single routers."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.balance.rules import ActiveExperts
from moe_dist.moe.routers.adaptive import AdaptiveRouter, PredictedKRouter, ReLURouter, ThresholdRouter, TopPRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.moe.routers.top_k import KINDS, TopKRouter
from moe_dist.moe.routing.types import ABSENT, Routing, RoutingCache, group_columns
from moe_dist.placement.placement import ExpertGroup
from tests.reference import adaptive as slow
from tests.reference.gating_residual import top_k_weights
from tests.reference.group_limited import limited_weights
from tests.support.cover import full_unless

T, D = 60, 6
PLAIN = (ExpertGroup("all", 8, 0, 4, 8, 0, ("text", "image")),)
MIXED = (  # groups of different sizes with null, identity and constant experts
    ExpertGroup("text", 6, 3, 4, 8, 0, ("text",), num_identity=1),
    ExpertGroup("image", 4, 1, 5, 8, 6, ("image",), num_identity=1, num_constant=1),
)
Loop = Callable[..., dict[int, Tensor]]


def top_k(x: Tensor, tensors: slow.Tensors, group: ExpertGroup) -> dict[int, Tensor]:
    null = range(group.num_experts, group.num_experts + group.num_null)
    return top_k_weights(tensors["rows"] @ x, top_k=group.top_k, null=null, bias_C=tensors["bias"])


def limited(x: Tensor, tensors: slow.Tensors, group: ExpertGroup, **options: Any) -> dict[int, Tensor]:
    return limited_weights(tensors["rows"] @ x, tensors.get("bias"), group, **options)


ALL_NODES, ONE_NODE = {"n_group": 2, "topk_group": 2}, {"n_group": 2, "topk_group": 1}
CASES: dict[str, tuple[type[TopKRouter], dict[str, Any], Loop, dict[str, Any]]] = {  # router and options, loop and options
    "top_k": (TopKRouter, {"selection_bias": True}, top_k, {}),
    "group_limited": (GroupLimitedRouter, {**ONE_NODE, "scale": 2.5}, limited, {**ONE_NODE, "scale": 2.5}),
    "group_limited, all nodes": (GroupLimitedRouter, ALL_NODES, limited, ALL_NODES),
    "group_limited, scores": (
        GroupLimitedRouter, {**ONE_NODE, "normalise": "none"}, limited, {**ONE_NODE, "normalise": False},
    ),
    "group_limited, no bias": (GroupLimitedRouter, {**ONE_NODE, "selection_bias": False}, limited, ONE_NODE),
    "top_p": (TopPRouter, {"p": 0.5}, slow.top_p, {"p": 0.5, "normalise": False}),
    "top_p, normalised": (TopPRouter, {"p": 0.7, "normalise": "true_chosen"}, slow.top_p, {"p": 0.7, "normalise": True}),
    "relu": (ReLURouter, {}, slow.relu, {}),
    "threshold": (ThresholdRouter, {"temperature": 0.5}, slow.threshold, {"temperature": 0.5}),
    "predicted_k": (PredictedKRouter, {}, slow.predicted_k, {"normalise": False}),
    "predicted_k, normalised": (PredictedKRouter, {"normalise": "true_chosen"}, slow.predicted_k, {"normalise": True}),
}  # fmt: skip


def made(name: str, groups: tuple[ExpertGroup, ...], *, bias: float = 0.2) -> Any:
    """Returns the router in float64 with drawn parameters and biases."""
    kind, options, _, _ = CASES[name]
    router = kind(RouterContext(D, groups), **options).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
        for buffer in (each for end, each in router.named_buffers() if end.endswith("bias")):
            buffer.normal_(std=bias, generator=generator)
    return router


def tokens(num_groups: int, count: int = T) -> tuple[Tensor, Tensor]:
    """Returns hidden rows, and each token's group, or -1 for padding."""
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(count, D, dtype=torch.double, generator=generator).requires_grad_()
    return h_TD, torch.randint(-1, num_groups, (count,), generator=generator)


def tensors_of(router: TopKRouter, group: ExpertGroup) -> dict[str, Tensor]:
    """Returns a gate's parameters and bias, and its router rows in the order of columns."""
    gate = router.gate(group)
    named = dict([*gate.named_parameters(), *gate.named_buffers()])
    return {"rows": torch.cat([named[kind] for kind in KINDS if kind in named]), **named}


def weights_of(router: TopKRouter, routing: Routing, count: int) -> Tensor:
    """Returns each token's weights of all columns [T, C], 0 for null columns."""
    weight_TC = torch.zeros(count, sum(group.num_columns for group in router.groups), dtype=torch.double)
    pairs = routing.assignments.taken()
    weight_TC = weight_TC.index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    if routing.zero_weight_TF is None:
        return weight_TC
    return torch.cat([weight_TC[:, : router.first_zero_computation], routing.zero_weight_TF], dim=1)


def weights_by_loop(name: str, router: TopKRouter, h_TD: Tensor, group_T: Tensor) -> Tensor:
    _, _, loop, options = CASES[name]
    owner_C = torch.tensor(group_columns(router.groups))
    rows = []
    for token, index in enumerate(group_T.tolist()):
        row_C = h_TD.new_zeros(len(owner_C))
        if index >= 0:
            group, columns = router.groups[index], (owner_C == index).nonzero()[:, 0]
            for column, weight in loop(h_TD[token], tensors_of(router, group), group, **options).items():
                row_C = row_C.index_put((columns[column],), weight)
        rows.append(row_C)
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "groups"), list(product(CASES, (PLAIN, MIXED))), ids=str)
def test_equals_the_loop_in_values_and_gradients(name: str, groups: tuple[ExpertGroup, ...]) -> None:
    router, (h_TD, group_T) = made(name, groups), tokens(len(groups))
    fast_TC = weights_of(router, router(h_TD, group_T), T)
    slow_TC = weights_by_loop(name, router, h_TD, group_T)
    torch.testing.assert_close(fast_TC, slow_TC, rtol=0, atol=1e-12)
    numbers = {int(n) for n in (fast_TC[:, : router.num_experts] > 0).sum(1)[group_T >= 0]}
    if isinstance(router, AdaptiveRouter):
        assert len(numbers) > 2, "tokens differ in the number of their experts"
    over = [h_TD, *router.parameters()]
    score_TC = torch.randn(fast_TC.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    fast, expected = (
        torch.autograd.grad((each * score_TC).sum(), over, allow_unused=True, materialize_grads=True, retain_graph=True)
        for each in (fast_TC, slow_TC)
    )
    torch.testing.assert_close(fast, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_of_what_is_taken_and_recomputation_takes_the_same(name: str) -> None:
    router, (h_TD, group_T) = made(name, MIXED), tokens(len(MIXED))
    cache = RoutingCache(keep_choices=True)
    first = router(h_TD, group_T, cache)
    taken_E = torch.bincount(first.assignments.taken().expert_N, minlength=router.num_experts)
    assert torch.equal(first.counts.choices_LC[0][: router.num_experts], taken_E)
    again = router(h_TD + 0.5, group_T, cache)
    assert torch.equal(again.assignments.expert_N, first.assignments.expert_N)
    number_T = (first.chosen.column_TK != ABSENT).sum(1)
    assert int(number_T.sum()) == int(first.counts.choices_LC.sum()), "the trace has the choices that count"


@pytest.mark.parametrize("name", CASES)
def test_padding_is_not_routed_and_not_counted(name: str) -> None:
    """Padding changes no result. A batch may have no token at all."""
    router, (h_TD, group_T) = made(name, MIXED), tokens(len(MIXED))
    kept_T = group_T >= 0
    padded, clean, empty = (router(h_TD[rows], group_T[rows]) for rows in (slice(None), kept_T, slice(0)))
    assert not (padded.assignments.expert_N.view(T, -1)[~kept_T] != ABSENT).any()
    torch.testing.assert_close((*padded.counts, *padded.aux), (*clean.counts, *clean.aux), rtol=0, atol=1e-12)
    assert (len(empty.assignments.token_N), int(empty.counts.choices_LC.sum())) == (0, 0)


@pytest.mark.parametrize("name", CASES)
def test_arithmetic_and_weights_are_fp32_for_bf16_tokens(name: str) -> None:
    router = made(name, MIXED).float()
    h_TD, group_T = tokens(len(MIXED))
    h_TD = h_TD.detach().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        coarse = router(h_TD, group_T)
    exact = router.double()(h_TD.double(), group_T)
    assert coarse.assignments.weight_N.dtype == coarse.aux.prob_LC.dtype == torch.float32
    torch.testing.assert_close(coarse.assignments.weight_N.double(), exact.assignments.weight_N, rtol=1e-4, atol=1e-5)


NAMES = ("top_p", "top_p, normalised", "relu", "threshold", "predicted_k", "predicted_k, normalised")


@pytest.mark.parametrize(
    ("name", "target", "nulls"),
    full_unless(
        lambda name, target, nulls: (
            ((target, nulls) == (1.5, 0) and "normalised" not in name) or (name, nulls) == ("threshold", 4)
        ),
        [(name, target, nulls) for name in NAMES for target, nulls in ((1.5, 0), (3.0, 0), (1.0, 4))],
    ),
)
def test_a_controller_holds_the_mean_number_of_true_experts(name: str, target: float, nulls: int) -> None:
    group = ExpertGroup("all", 8, nulls, 8, 8, 0, ("text",))
    router = made(name, (group,), bias=0.0)
    rate = 20.0 if name.startswith(("relu", "predicted_k")) else 2.0  # relu's and predicted_k's biases are logits
    rule = ActiveExperts({"all": target}, rate=rate, decay_steps=50, proportional=rate / 4)
    gate: Any = router.gate(group)
    gate.bias[:8] += 1.0  # starts with too many experts per token
    moved, loads = BiasController([[gate]], (group,), [rule]), []
    generator = torch.Generator().manual_seed(3)
    for _ in range(300):
        h_TD = torch.randn(256, D, dtype=torch.double, generator=generator)
        with torch.no_grad():
            routed = router(h_TD, torch.zeros(256, dtype=torch.int64))
        moved.after_step(routed.counts)
        loads.append(float(routed.counts.choices_LC[0][:8].sum()) / 256)
    assert loads[0] > target + 0.3
    assert sum(loads[-100:]) / 100 == pytest.approx(target, rel=0.02)
