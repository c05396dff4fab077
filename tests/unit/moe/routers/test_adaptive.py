"""Routers that choose the number of columns by token.

Values and gradients equal loops over tokens. A controller holds each router at a budget. Recompute and padding change
nothing.
"""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.moe.balance.active_experts import ActiveExperts
from moe_dist.moe.balance.controller import BiasController
from moe_dist.moe.routers.adaptive import AdaptiveRouter
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.predicted_k import PredictedKRouter
from moe_dist.moe.routers.relu import ReLURouter
from moe_dist.moe.routers.threshold import ThresholdRouter
from moe_dist.moe.routers.top_p import TopPRouter
from moe_dist.moe.routing.types import ABSENT, RoutingCache
from moe_dist.placement.placement import ExpertGroup
from tests.reference import adaptive as slow
from tests.support.cover import full_unless

T, D = 60, 6
PLAIN = (ExpertGroup("all", 8, 0, 8, 8, 0, ("text", "image")),)
MIXED = (  # uneven groups with null, identity and constant experts; the first has fewer choices than columns
    ExpertGroup("text", 5, 3, 4, 8, 0, ("text",), num_identity=1),
    ExpertGroup("image", 4, 1, 6, 8, 5, ("image",), num_identity=1, num_constant=1),
)
KINDS = ("true", "null", "identity", "constant")
Case = tuple[type[AdaptiveRouter], dict[str, Any], Callable[..., dict[int, Tensor]], dict[str, Any]]
CASES: dict[str, Case] = {  # the router with its options, and the loop with its options
    "top_p": (TopPRouter, {"p": 0.5}, slow.top_p, {"p": 0.5, "normalise": False}),
    "top_p, normalised": (TopPRouter, {"p": 0.7, "normalise": "true_chosen"}, slow.top_p, {"p": 0.7, "normalise": True}),
    "relu": (ReLURouter, {}, slow.relu, {}),
    "threshold": (ThresholdRouter, {"temperature": 0.5}, slow.threshold, {"temperature": 0.5}),
    "predicted_k": (PredictedKRouter, {}, slow.predicted_k, {"normalise": False}),
    "predicted_k, normalised": (PredictedKRouter, {"normalise": "true_chosen"}, slow.predicted_k, {"normalise": True}),
}


def made(name: str, groups: tuple[ExpertGroup, ...], *, bias: float = 0.2, **more: Any) -> AdaptiveRouter:
    kind, options, _, _ = CASES[name]
    router = kind(RouterContext(D, groups), **options, **more).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.normal_(generator=generator)
        for group in groups:
            router.gate(group).bias.double()[: group.num_experts].normal_(std=bias, generator=generator)
    return router


def tokens(num_groups: int, count: int = T) -> tuple[Tensor, Tensor]:
    """Returns rows, and groups with padding among them."""
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(count, D, dtype=torch.double, generator=generator).requires_grad_()
    return h_TD, torch.randint(-1, num_groups, (count,), generator=generator)


def tensors_of(router: AdaptiveRouter, group: ExpertGroup) -> dict[str, Tensor]:
    gate = router.gate(group)
    named = dict(gate.named_parameters())
    return {"rows": torch.cat([named[kind] for kind in KINDS if kind in named]), "bias": gate.bias, **named}


def columns_of(groups: tuple[ExpertGroup, ...], group: ExpertGroup) -> list[int]:
    """Returns the columns of one group among all choice columns, in the group's order."""
    counts = [[getattr(each, f"num_{kind}") for each in groups] for kind in ("experts", "null", "identity", "constant")]
    index, first, columns = groups.index(group), 0, []
    for kind in counts:
        start = first + sum(kind[:index])
        columns += range(start, start + kind[index])
        first += sum(kind)
    return columns


def fast_table(router: AdaptiveRouter, h_TD: Tensor, group_T: Tensor) -> Tensor:
    """Returns the weight of each token's column [T, C], 0 for null columns."""
    routing = router(h_TD, group_T)
    weight_TC = torch.zeros(len(h_TD), sum(group.num_columns for group in router.groups), dtype=torch.double)
    pairs = routing.assignments.taken()
    weight_TC = weight_TC.index_put((pairs.token_N, pairs.expert_N), pairs.weight_N)
    if routing.zero_weight_TF is not None:
        weight_TC = torch.cat([weight_TC[:, : router.first_zero_computation], routing.zero_weight_TF], dim=1)
    return weight_TC


def slow_table(name: str, router: AdaptiveRouter, h_TD: Tensor, group_T: Tensor) -> Tensor:
    _, _, loop, options = CASES[name]
    rows = []
    for token, index in enumerate(group_T.tolist()):
        row_C = h_TD.new_zeros(sum(group.num_columns for group in router.groups))
        if index >= 0:
            group = router.groups[index]
            columns = columns_of(router.groups, group)
            for column, weight in loop(h_TD[token], tensors_of(router, group), group, **options).items():
                row_C = row_C.index_put((torch.tensor(columns[column]),), weight)
        rows.append(row_C)
    return torch.stack(rows)


@pytest.mark.parametrize(("name", "groups"), list(product(CASES, (PLAIN, MIXED))), ids=str)
def test_equals_the_loop_in_values_and_gradients(name: str, groups: tuple[ExpertGroup, ...]) -> None:
    router, (h_TD, group_T) = made(name, groups), tokens(len(groups))
    fast_TC, slow_TC = fast_table(router, h_TD, group_T), slow_table(name, router, h_TD, group_T)
    torch.testing.assert_close(fast_TC, slow_TC, rtol=0, atol=1e-12)
    numbers = {int(n) for n in (fast_TC[:, : router.num_experts] > 0).sum(1)[group_T >= 0]}
    assert len(numbers) > 2, "tokens differ in the number of their experts"
    over = [h_TD, *router.parameters()]
    score_TC = torch.randn(fast_TC.shape, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    fast, expected = (
        torch.autograd.grad((each * score_TC).sum(), over, allow_unused=True, materialize_grads=True, retain_graph=True)
        for each in (fast_TC, slow_TC)
    )
    for ours, theirs in zip(fast, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_counts_are_of_what_is_taken_and_recomputation_takes_the_same(name: str) -> None:
    router, (h_TD, group_T) = made(name, MIXED), tokens(len(MIXED))
    cache = RoutingCache(keep_choices=True)
    first = router(h_TD, group_T, cache)
    taken_E = torch.bincount(first.assignments.taken().expert_N, minlength=router.num_experts)
    assert torch.equal(first.counts.choices_LC[0][: router.num_experts], taken_E)
    again = router(h_TD + 0.5, group_T, cache)
    assert torch.equal(again.assignments.expert_N, first.assignments.expert_N)
    assert first.chosen is not None
    number_T = (first.chosen.column_TK != ABSENT).sum(1)
    assert int(number_T.sum()) == int(first.counts.choices_LC.sum()), "the trace has the choices that count"
    assert not number_T[group_T < 0].any(), "padding takes nothing"


@pytest.mark.parametrize("name", CASES)
def test_no_token_at_all(name: str) -> None:
    empty = made(name, MIXED)(torch.zeros(0, D, dtype=torch.double), torch.zeros(0, dtype=torch.int64))
    assert (len(empty.assignments.token_N), int(empty.counts.choices_LC.sum())) == (0, 0)


@pytest.mark.parametrize(
    ("name", "target", "nulls"),
    full_unless(
        lambda name, target, nulls: (target, nulls) == (1.5, 0) or (name, nulls) == ("threshold", 4),
        [(name, target, nulls) for name in CASES for target, nulls in ((1.5, 0), (3.0, 0), (1.0, 4))],
    ),
)
def test_a_controller_holds_the_mean_number_of_true_experts(name: str, target: float, nulls: int) -> None:
    group = ExpertGroup("all", 8, nulls, 8, 8, 0, ("text",))
    router = made(name, (group,), bias=0.0)
    rate = 20.0 if name.startswith(("relu", "predicted_k")) else 2.0  # these biases are logits, not probabilities
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


def test_by_hand() -> None:
    """Of two equal probabilities p = 0.5 takes one, and p = 0.51 takes both. ReLU takes only positive logits."""
    group = ExpertGroup("all", 2, 0, 2, 8, 0, ("text",))
    x_1D, group_1 = torch.eye(D, dtype=torch.double)[:1], torch.zeros(1, dtype=torch.int64)
    for kind, options, logits, expected in (
        (TopPRouter, {"p": 0.5}, torch.tensor([1.0, 1.0]), [0.5, 0.0]),
        (TopPRouter, {"p": 0.51}, torch.tensor([1.0, 1.0]), [0.5, 0.5]),
        (ReLURouter, {"scale": 2.0}, torch.tensor([0.25, 0.0]), [0.5, 0.0]),
    ):
        router = kind(RouterContext(D, (group,)), **options).double()
        with torch.no_grad():
            router.gate(group).get_parameter("true").zero_()[:, 0] = logits
        table_1C = fast_table(router, x_1D, group_1)
        torch.testing.assert_close(table_1C[0], torch.tensor(expected, dtype=torch.double), rtol=1e-6, atol=0)


def test_the_output_is_continuous_where_a_choice_changes() -> None:
    """With ReLU and predicted k, a small input step that changes the number of experts changes the weights only a
    little."""
    for name in ("relu", "predicted_k"):
        router = made(name, PLAIN, bias=0.0)
        line = torch.linspace(0, 1, 4001, dtype=torch.double)[:, None]
        ends = torch.randn(2, D, dtype=torch.double, generator=torch.Generator().manual_seed(5))
        inputs = ends[0] + line * (ends[1] - ends[0])
        table = fast_table(router, inputs, torch.zeros(4001, dtype=torch.int64)).detach()
        changes = ((table[1:] > 0) != (table[:-1] > 0)).any(1)
        assert changes.any()
        if name == "relu":
            assert float((table[1:] - table[:-1]).abs().max()) < 5e-3
        else:  # only the sum of weights is continuous, because two experts swap places at equal probabilities
            assert float((table.sum(1)[1:] - table.sum(1)[:-1]).abs().max()) < 5e-3
