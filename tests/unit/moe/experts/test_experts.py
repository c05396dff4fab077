"""Tests grouped products, and the memory of experts with a pair budget and with recomputation. test_layer.py compares
layers with loops."""

from typing import Any

import pytest
import torch

from moe_dist.comm.all_to_all import Splits
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.experts.experts import Experts
from moe_dist.moe.routers.context import RouterContext
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.placement.placement import ExpertGroup
from tests.support.one_rank_layer import one_rank_layer


def kept_bytes(row_of: torch.Tensor, *, recompute: bool, pair_budget: int | None) -> int:
    """Returns the bytes that autograd keeps from one bf16 forward pass over 64 rows, without parameters, inputs and
    plan. `row_of` has the row of each pair."""
    group = ExpertGroup("all", 4, 0, 4, 16, 0, ("text",))
    experts = Experts(32, (group,), (4,), pair_budget=pair_budget)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_RD = torch.randn(64, 32).bfloat16().requires_grad_()
    weight_Q = torch.rand(len(row_of), requires_grad=True)
    counts = torch.full((4,), len(row_of) // 4).tolist()
    none = Splits((0,), (0,))
    empty = torch.zeros(0, dtype=torch.int64)
    plan = AllToAllPlan(
        "", "", "", 64, none, none, empty, torch.arange(64), empty, torch.arange(len(row_of)), row_of, tuple(counts)
    )
    known = {p.untyped_storage().data_ptr() for p in (rows_RD, weight_Q, row_of, *experts.parameters())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = experts(DispatchedRows(rows_RD, weight_Q), plan, recompute=recompute)
    assert held.requires_grad
    return sum(kept.values())


def test_what_recompute_and_the_budget_keep_does_not_grow_with_pairs() -> None:
    few, many = torch.arange(64).repeat(1), torch.arange(64).repeat(4)
    for recompute, budget in ((True, None), (False, 32)):
        assert kept_bytes(many, recompute=recompute, pair_budget=budget) == kept_bytes(
            few, recompute=recompute, pair_budget=budget
        )
    plain = kept_bytes(many, recompute=False, pair_budget=None)
    assert plain > kept_bytes(few, recompute=False, pair_budget=None)
    # Only bf16 tensors are kept: x, y, gate, up, two intermediates of SwiGLU, and converted weights.
    pairs, dim, ffn = len(many), 32, 16
    assert plain <= pairs * 2 * (2 * dim + 4 * ffn) + 4 * 3 * dim * ffn * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pair_budget", "recompute"), [(None, "none"), (7, "none"), (None, "experts"), (5, "block")])
def test_grouped_products_give_what_the_loop_gives(dtype: torch.dtype, pair_budget: int | None, recompute: str) -> None:
    """Compares whole layers, with chunks that cut an expert's rows, a group without rows, and recomputation."""
    groups = (ExpertGroup("text", 4, 2, 3, 16, 0, ("text",)), ExpertGroup("image", 3, 0, 2, 8, 4, ("image",)))
    results = []
    for gemm in ("loop", "grouped"):
        torch.manual_seed(0)
        options: dict[str, Any] = {"pair_budget": pair_budget, "gemm": gemm, "recompute": recompute}
        layer = one_rank_layer(TopKRouter(RouterContext(16, groups)), 16, std=0.3, **options)
        h_TD = torch.randn(30, 16).to(dtype).requires_grad_()
        y_TD, _ = layer(h_TD, torch.randint(-1, 1, (30,)))  # no image token
        (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
        results.append([y_TD.detach(), h_TD.grad, *(parameter.grad for parameter in layer.parameters())])
    for loop, grouped in zip(*results, strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(loop.abs().max())
        torch.testing.assert_close(grouped, loop, rtol=0, atol=bound)
