"""Experts over slot-sorted rows: against loops, empty experts, and the row budget's chunks."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.exchange import AllToAllPlan
from moe_dist.moe.dispatch.interface import DispatchedRows
from moe_dist.moe.experts.experts import Experts, slot_chunks
from moe_dist.moe.layer import MoELayer
from moe_dist.moe.routers.top_k import TopKRouter
from moe_dist.moe.routing.types import Assignments, RoutingRequest
from moe_dist.placement.parameter_names import group_module
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import ReferenceWeights, moe_forward

D = 6
GROUPS = (ExpertGroup("text", 4, 2, 3, 5, 0, ("text",)), ExpertGroup("image", 3, 2, 2, 7, 4, ("image",)))


def make_layer(pair_budget: int | None, recompute: str) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(
        norm=torch.nn.Identity(),
        router=TopKRouter(D, GROUPS),
        experts=Experts(D, GROUPS, (4, 3), pair_budget=pair_budget),
        dispatcher=AllToAllDispatcher(ExpertPlacement(GROUPS, (tuple(range(7)),)), AllToAll(None, CommStats())),
        recompute=recompute,  # pyright: ignore[reportArgumentType]
    ).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    return layer


@pytest.mark.parametrize("pair_budget", [None, 1, 7, 1000])
@pytest.mark.parametrize("recompute", ["none", "experts", "block"])
def test_the_layer_equals_the_oracle(pair_budget: int | None, recompute: str) -> None:
    layer = make_layer(pair_budget, recompute)
    h_TD = torch.randn(30, D, dtype=torch.double, requires_grad=True)
    group_T = torch.randint(-1, 2, (30,))
    weights = {}
    for group in GROUPS:
        gate, stack = (
            layer.router.get_submodule(group_module(group.name)),
            layer.experts.get_submodule(group_module(group.name)),
        )
        weights[group.name] = ReferenceWeights(gate.true, gate.null, stack.gate, stack.up, stack.down)  # pyright: ignore
    expected = moe_forward(h_TD, group_T.tolist(), GROUPS, weights)
    y_TD, _ = layer(h_TD, group_T)
    torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-10)
    direction = torch.randn_like(y_TD)
    inputs = [h_TD, *layer.parameters()]
    ours = torch.autograd.grad((y_TD * direction).sum(), inputs)
    theirs = torch.autograd.grad((expected * direction).sum(), inputs)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)


def test_experts_without_rows_get_zero_gradients_not_none() -> None:
    layer = make_layer(None, "none")
    y_TD, _ = layer(torch.randn(8, D, dtype=torch.double), torch.zeros(8, dtype=torch.int64))  # text alone
    y_TD.sum().backward()
    for parameter in layer.experts.get_submodule("group:image").parameters():
        assert parameter.grad is not None
        assert (parameter.grad == 0).all()


def test_a_batch_of_padding_alone_reaches_every_parameter_with_zeros() -> None:
    layer = make_layer(None, "none")
    y_TD, report = layer(torch.randn(4, D, dtype=torch.double), torch.full((4,), -1))
    (y_TD.sum() + report.sums.prob_C.sum() + report.sums.log_z_squared_G.sum()).backward()
    assert (y_TD == 0).all()
    assert all(p.grad is not None and (p.grad == 0).all() for p in layer.parameters())


def test_ablation_zeroes_the_output_and_nothing_else() -> None:
    layer = make_layer(None, "none")
    h_TD, group_T = torch.randn(10, D, dtype=torch.double), torch.randint(0, 2, (10,))
    _, before = layer(h_TD, group_T)
    y_TD, after = layer(h_TD, group_T, RoutingRequest(experts_off=True))
    assert (y_TD == 0).all()
    assert torch.equal(before.sums.choices_C, after.sums.choices_C)


#   counts 3 0 4 1, budget 3:   aaa | ccc | c d
def test_chunks_drawn_by_hand() -> None:
    assert slot_chunks((3, 0, 4, 1), 3) == [(3, 0, 0, 0), (0, 0, 3, 0), (0, 0, 1, 1)]
    assert slot_chunks((3, 0, 4, 1), 8) == [(3, 0, 4, 1)]
    assert slot_chunks((0, 0), 5) == [(0, 0)]
    assert slot_chunks((), 5) == [()]


def kept_bytes(row_of: torch.Tensor, *, recompute: bool, pair_budget: int | None) -> int:
    """Bytes that autograd keeps of one bf16 forward over 64 rows with `row_of` pairs; parameters, inputs and plan apart."""
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
    # x and y in bf16, gate, up and two intermediates of SwiGLU in bf16, weight casts of bf16: never y in fp32.
    pairs, dim, ffn = len(many), 32, 16
    assert plain <= pairs * 2 * (2 * dim + 4 * ffn) + 4 * 3 * dim * ffn * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("pair_budget", "recompute"), [(None, "none"), (7, "none"), (None, "experts"), (5, "block")])
def test_grouped_products_give_what_the_loop_gives(dtype: torch.dtype, pair_budget: int | None, recompute: str) -> None:
    """Through the layer: chunks that cut an expert's run, a group without rows, recomputation."""
    groups = (ExpertGroup("text", 4, 2, 3, 16, 0, ("text",)), ExpertGroup("image", 3, 0, 2, 8, 4, ("image",)))
    results = []
    for gemm in ("loop", "grouped"):
        torch.manual_seed(0)
        layer = MoELayer(
            norm=torch.nn.Identity(),
            router=TopKRouter(16, groups),
            experts=Experts(16, groups, (4, 3), pair_budget=pair_budget, gemm=gemm),  # pyright: ignore[reportArgumentType]
            dispatcher=AllToAllDispatcher(ExpertPlacement(groups, (tuple(range(7)),)), AllToAll(None, CommStats())),
            recompute=recompute,  # pyright: ignore[reportArgumentType]
        )
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        h_TD = torch.randn(30, 16).to(dtype).requires_grad_()
        y_TD, _ = layer(h_TD, torch.randint(-1, 1, (30,)))  # no image token
        (y_TD * torch.linspace(-1, 1, y_TD.numel()).view_as(y_TD)).sum().backward()
        results.append([y_TD.detach(), h_TD.grad, *(parameter.grad for parameter in layer.parameters())])
    for loop, grouped in zip(*results, strict=True):
        bound = 16 * torch.finfo(dtype).eps * float(loop.abs().max())
        torch.testing.assert_close(grouped, loop, rtol=0, atol=bound)


class Joined(TorchDispatchMode):
    """Counts the tensors that are made by joining others."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "cat"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("num_groups", "joined"), [(1, 0), (2, 1)])
def test_outputs_of_one_group_are_not_copied(num_groups: int, joined: int) -> None:
    groups = tuple(ExpertGroup(name, 2, 0, 1, 8, 2 * i, (name,)) for i, name in enumerate(("text", "image")[:num_groups]))
    placement = ExpertPlacement(groups, (tuple(range(2 * num_groups)),))
    dispatcher = AllToAllDispatcher(placement, AllToAll(None, CommStats()))
    experts = Experts(8, groups, [2] * num_groups, gemm="grouped")
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter)
    rows_RD = torch.randn(6, 8)
    assignments = Assignments(torch.arange(6), torch.arange(6) % (2 * num_groups), torch.ones(6))
    (plan,), _ = dispatcher.planner.plan(assignments, 6, "layer")
    with Joined() as seen:
        experts(DispatchedRows(rows_RD, torch.ones(6)), plan)
    assert seen.count == joined
