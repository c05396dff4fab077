"""LoRA experts have the same values and gradients as a loop over tokens. Also tests which parameters the task loss
trains, and dropout."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.model.layers import RMSNorm, SwiGLU
from moe_dist.moe.experts.lora import LoRAExperts, LoRALayer
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.counts import SentCounts
from moe_dist.moe.routing.draws import dropped
from moe_dist.moe.routing.types import GlobalBatchInfo, RoutingRequest
from moe_dist.placement.placement import ExpertGroup
from tests.reference.lora import reference_lora_layer

D, F, RANK, ALPHA = 6, 10, 2, 3.0
TOP_1 = (ExpertGroup("all", 3, 0, 1, F, 0, ("text",)),)
SEVERAL = (
    ExpertGroup("text", 3, 2, 2, F, 0, ("text",)),
    ExpertGroup("image", 2, 3, 3, F, 3, ("image",)),
    ExpertGroup("sound", 1, 0, 1, F, 5, ("sound",)),
)


def make_layer(groups: tuple[ExpertGroup, ...], *, recompute: Any = "none", **options: Any) -> LoRALayer:
    torch.manual_seed(0)
    layer = LoRALayer(
        norm=RMSNorm(D, 1e-5),
        router=TopKRouter(RouterContext(D, groups), normalise="none"),
        ffn=SwiGLU(D, F),
        adapters=LoRAExperts(D, F, groups, rank=RANK, alpha=ALPHA, **options),
        recompute=recompute,
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    layer.norm.requires_grad_(False)
    layer.ffn.requires_grad_(False)
    return layer


def inputs(group_T: Tensor, seed: int = 1) -> Tensor:
    return torch.randn(len(group_T), D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradients(y_TD: Tensor, layer: LoRALayer, x_TD: Tensor) -> dict[str, Tensor | None]:
    named = dict(layer.named_parameters(), x=x_TD)
    trained = {name: p for name, p in named.items() if p.requires_grad}
    target = torch.linspace(-1, 1, y_TD.numel(), dtype=y_TD.dtype).view_as(y_TD)
    found = torch.autograd.grad((y_TD * target).sum(), list(trained.values()), allow_unused=True, retain_graph=True)
    return dict(zip(trained, found, strict=True))


CASES: dict[str, tuple[tuple[ExpertGroup, ...], list[int], dict[str, Any]]] = {
    "top-1": (TOP_1, [0] * 12, {}),
    "straight-through": (TOP_1, [0] * 12, {"weight": "straight_through"}),
    "published": (TOP_1, [0] * 12, {"weight": "published"}),
    "groups, nulls, padding": (SEVERAL, [0, 1, -1, 0, 2, 1, 1, 0, -1, 0, 1, 2], {}),
    "straight-through over groups": (SEVERAL, [0, 1, -1, 0, 2, 1, 1, 0], {"weight": "straight_through"}),
    "groups without tokens": (SEVERAL, [1, 1, 1], {}),
    "padding alone": (SEVERAL, [-1, -1], {}),
    "no token": (SEVERAL, [], {}),
    "soft mixture": ((ExpertGroup("all", 4, 0, 4, F, 0, ("text",)),), [0] * 7, {}),
    "two targets": (SEVERAL, [0, 1, 0, 2], {"targets": ("gate", "down")}),
    "one expert": ((ExpertGroup("all", 1, 0, 1, F, 0, ("text",)),), [0] * 5, {"targets": ("up",)}),
}


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop_over_tokens(case: str, recompute: str) -> None:
    groups, group, options = CASES[case]
    layer, group_T = make_layer(groups, recompute=recompute, **options), torch.tensor(group, dtype=torch.int64)
    x_TD = inputs(group_T).requires_grad_()
    y_TD, report = layer(x_TD, group_T)
    if not group:
        assert y_TD.shape == (0, D)
        assert all(g is not None and not g.any() for name, g in gradients(y_TD, layer, x_TD).items() if "adapters" in name)
        return
    weight = options.get("weight", "probability")
    expected_TD = reference_lora_layer(layer, x_TD, group_T, groups, rank=RANK, alpha=ALPHA, weight=weight)
    torch.testing.assert_close(y_TD, expected_TD, rtol=1e-12, atol=1e-12)
    wanted, got = gradients(expected_TD, layer, x_TD), gradients(y_TD, layer, x_TD)
    for name, expected in wanted.items():
        found = got[name]
        if name.startswith("adapters."):
            assert found is not None, "an adapter that no token took has a zero gradient, not None"
        if found is not None:
            expected = torch.zeros_like(found) if expected is None else expected
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    taken = int(report.counts.choices_LC[0][: sum(g.num_experts for g in groups)].sum())
    assert report.sent == SentCounts(0, taken, 0)


def test_null_choices_pass_the_frozen_ffn_to_the_last_bit() -> None:
    layer, group_T = make_layer((ExpertGroup("all", 1, 3, 1, F, 0, ("text",)),)), torch.zeros(6, dtype=torch.int64)
    with torch.no_grad():
        gate = layer.router.get_submodule("group:all")
        gate.get_parameter("true").zero_()
        gate.get_parameter("null").zero_()[0] = 1.0
    layer.norm.weight.data.fill_(1.0)  # pyright: ignore
    x_TD = inputs(group_T).abs()
    y_TD, report = layer(x_TD, group_T)
    assert report.sent.pairs == 0
    assert torch.equal(y_TD, layer.ffn(layer.norm(x_TD)))


def test_second_matrices_of_zeros_change_no_bit() -> None:
    layer, group_T = make_layer(SEVERAL).float(), torch.tensor([0, 1, 2, -1] * 8)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("_b"):
                parameter.zero_()
    x_TD = inputs(group_T).float()
    assert torch.equal(layer(x_TD, group_T)[0], layer.ffn(layer.norm(x_TD)))


def test_ablated_the_frozen_ffn_is_left() -> None:
    layer, group_T = make_layer(TOP_1), torch.zeros(5, dtype=torch.int64)
    x_TD = inputs(group_T)
    y_TD, _ = layer(x_TD, group_T, RoutingRequest(experts_off=True))
    assert torch.equal(y_TD, layer.ffn(layer.norm(x_TD)))


@pytest.mark.parametrize(("weight", "learns"), [("probability", True), ("straight_through", True), ("published", False)])
def test_who_learns_the_route_from_the_task(weight: str, learns: bool) -> None:
    """In the published sparse form only the balance loss trains the router; the task loss gives the router no gradient."""
    layer, group_T = make_layer(TOP_1, weight=weight), torch.zeros(9, dtype=torch.int64)
    x_TD = inputs(group_T).requires_grad_()
    y_TD, report = layer(x_TD, group_T)
    gradient = gradients(y_TD, layer, x_TD)["router.group:all.true"]
    assert (gradient is not None and bool(gradient.abs().max() > 1e-3)) is learns
    (by_balance,) = torch.autograd.grad(
        report.aux.prob_LC[0][0], [layer.router.get_submodule("group:all").get_parameter("true")]
    )
    assert by_balance.any()


def test_a_probability_that_underflows_has_a_weight_of_one() -> None:
    layer = make_layer((ExpertGroup("all", 2, 0, 2, F, 0, ("text",)),), weight="straight_through").float()
    with torch.no_grad():
        layer.router.get_submodule("group:all").get_parameter("true").copy_(torch.tensor([[500.0] * D, [-500.0] * D]))
    x_TD = torch.ones(3, D).requires_grad_()
    y_TD, _ = layer(x_TD, torch.zeros(3, dtype=torch.int64))
    assert y_TD.isfinite().all()
    assert all(g is None or g.isfinite().all() for g in gradients(y_TD, layer, x_TD).values())


def request(step: int = 0, first_token: int = 0, rank: int = 0) -> RoutingRequest:
    return RoutingRequest(GlobalBatchInfo(step, first_token, rank, (12, 12), ((12,), (12,))))


@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_dropout_draws_the_same_again(recompute: str) -> None:
    """Recomputation draws the same dropout as the forward pass, so the gradients belong to the forward pass's values."""
    group_T = torch.zeros(12, dtype=torch.int64)
    plain, layer = (make_layer(TOP_1, dropout=0.4, recompute=each) for each in ("none", recompute))
    x_TD = inputs(group_T).requires_grad_()
    y_TD, again_TD = (each(x_TD, group_T, request()) for each in (plain, layer))
    torch.testing.assert_close(y_TD[0], again_TD[0], rtol=0, atol=0)
    expected, got = gradients(y_TD[0], plain, x_TD), gradients(again_TD[0], layer, x_TD)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-15)
    for other in (request(step=1), request(first_token=24), request(rank=1)):
        assert not torch.equal(layer(x_TD, group_T, other)[0], y_TD[0])
    layer.eval()
    assert not torch.equal(layer(x_TD, group_T)[0], y_TD[0])
    torch.testing.assert_close(
        layer(x_TD, group_T)[0],
        reference_lora_layer(layer, x_TD, group_T, TOP_1, rank=RANK, alpha=ALPHA, weight="probability"),
    )


def test_bf16_keeps_routing_weights_in_fp32() -> None:
    layer, group_T = make_layer(SEVERAL).float(), torch.tensor([0, 1, 2, -1] * 6)
    x_TD = inputs(group_T)
    expected_TD, _ = layer(x_TD.float(), group_T)
    y_TD, _ = layer(x_TD.to(torch.bfloat16), group_T)
    assert y_TD.dtype == torch.bfloat16
    assert layer.router(layer.norm(x_TD.to(torch.bfloat16)), group_T).assignments.weight_N.dtype == torch.float32
    assert (y_TD.float() - expected_TD).abs().max() < 0.05 * expected_TD.abs().max()


def test_dropout_keeps_the_mean() -> None:
    x = torch.ones(200, 100)
    y = dropped(x, 0.25, name=(1, 2, 3))
    torch.testing.assert_close(y.unique(), torch.tensor([0.0, 4 / 3]))
    assert y.mean().item() == pytest.approx(1.0, abs=0.02)
