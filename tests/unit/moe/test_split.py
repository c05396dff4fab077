"""Experts that are the parts of an FFN together compute the FFN. They are bit-equal to an FFN that sums its last
product by parts."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.group_limited import GroupLimitedRouter
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.parallel.own_model import build_moe_layer
from moe_dist.placement.placement import ExpertGroup

D, F_ALL, N, T = 24, 96, 8, 50


def swiglu(x_TD: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x_TD, gate)) * F.linear(x_TD, up), down)


def test_all_parts_are_the_ffn_whose_last_product_is_summed_by_parts() -> None:
    """With every router that a split allows, fp32 results are bit-equal to an FFN that sums its last product by parts.
    A single product over all hidden values sums in a different order. If both are computed in float64 and rounded to
    fp32, they agree."""
    torch.manual_seed(0)
    x_TD = torch.randn(T, D)
    gate, up, down = torch.randn(F_ALL, D), torch.randn(F_ALL, D), torch.randn(D, F_ALL)
    parts = list(zip(gate.chunk(N), up.chunk(N), down.chunk(N, dim=1), strict=True))
    group = ExpertGroup("text", N, N, N, F_ALL // N, 0, ("text",))
    for router in (
        TopKRouter(RouterContext(D, [group]), normalise="true_chosen", scale=N),
        TopKRouter(RouterContext(D, [group]), normalise="none", scale=2 * N),
        GroupLimitedRouter(RouterContext(D, [group]), normalise="none", scale=2.0),
    ):
        layer = build_moe_layer(D, [group], router=router)
        stack = layer.experts.get_submodule("group:text")
        with torch.no_grad():
            for name, whole in zip(("gate", "up", "down"), zip(*parts, strict=True), strict=True):
                stack.get_parameter(name).copy_(torch.stack(whole))
            router.gate(group).zero_rows(0.01)  # pyright: ignore[reportCallIssue]
        y_TD, report = layer(x_TD, torch.zeros(T, dtype=torch.int64))
        assert report.sent.pairs == N * T, "no null choice"
        by_parts = torch.zeros(T, D)
        for part in parts:
            by_parts = by_parts + swiglu(x_TD, *part)
        assert torch.equal(y_TD, by_parts)
        whole = swiglu(x_TD, gate, up, down)
        assert float((y_TD - whole).detach().abs().max() / whole.abs().max()) < 2e-6
        exact, _ = layer.double()(x_TD.double(), torch.zeros(T, dtype=torch.int64))
        assert torch.equal(exact.float(), swiglu(*(each.double() for each in (x_TD, gate, up, down))).float())
