"""Exchanges of fixed sizes equal exchanges of exact sizes up to rounding, and count their padding and overflow."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.errors import ResourceError
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.static import StaticDispatcher
from moe_dist.moe.dispatch.static_planning import StaticRoom
from moe_dist.moe.experts.experts import Experts, on_host
from moe_dist.moe.experts.static_storage import on_device
from moe_dist.moe.kernels import torch_kernels as rows
from moe_dist.moe.routing.types import Assignments
from moe_dist.parallel.mesh import Mesh, make_mesh
from moe_dist.placement.placement import ExpertPlacement
from tests.distributed.test_host_syncs import PLACEMENTS, D, T, capped_layer
from tests.support.cover import exhaustive, full
from tests.support.layouts import Layout, train
from tests.support.routings import Case, random_case
from tests.support.syncs import host_syncs
from tests.support.worlds import RankContext

HIDDEN, FFN = 8, 16  # multiples of the SIMD width; beyond the last multiple a CPU rounds silu differently
WHOLE = 1e9  # a bound of static exchanges that no choice exceeds


def wire_of(mesh: Mesh) -> AllToAll:
    return AllToAll(mesh.ep if mesh.world_size > 1 else None, CommStats(events=[]))


def trip(rank: int, case: Case, wire: AllToAll, dtype: torch.dtype, *, static: bool) -> tuple[list[Tensor], Any]:
    """Runs a case with real experts. Returns the output, the gradients of tokens, weights and experts, and the plan."""
    chosen = torch.from_numpy(case.experts_TK[rank])
    num_tokens, top_k = chosen.shape
    placement = ExpertPlacement((replace(case.placement.groups[0], ffn_dim=FFN),), case.slots)
    generator = torch.Generator().manual_seed(rank)
    h_TD = torch.randn(num_tokens, HIDDEN, dtype=dtype, generator=generator).requires_grad_()
    weight_N = torch.rand(num_tokens * top_k, dtype=dtype, generator=generator).requires_grad_()
    assignments = case.assignments(rank, weight_N)
    local, gemm = [len(case.slots[rank])], "loop" if dtype == torch.float64 else "grouped"
    storage = on_device if static else on_host
    experts = Experts(HIDDEN, placement.groups, local, storage=storage, gemm=gemm).to(dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    if static:
        tokens, choices = (max(each.shape[axis] for each in case.experts_TK) for axis in (0, 1))
        pairs = tuple(tokens * min(choices, len(slots)) for slots in case.slots)
        computed = tuple((wire.size * each,) for each in pairs)
        room = StaticRoom((tokens,) * wire.size, pairs, computed)
        dispatcher: Any = StaticDispatcher(DispatchContext(placement, wire), room=room)
    else:
        dispatcher = AllToAllDispatcher(DispatchContext(placement, wire))
    plan = dispatcher.plan(assignments, num_tokens)
    y_TD, _ = dispatcher.run(h_TD, weight_N, plan, experts=experts)
    direction = torch.randn(y_TD.shape, dtype=dtype, generator=generator)
    (y_TD * direction).sum().backward()
    found = [y_TD.detach(), h_TD.grad, weight_N.grad, *(each.grad for each in experts.parameters())]
    return [each for each in found if each is not None], plan


def run_cases(rank: RankContext, seeds: range) -> int:
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    for seed in seeds:
        case, dtype = random_case(seed, rank.world_size), (torch.float64, torch.float32)[seed % 2]
        expected, known = trip(rank.rank, case, wire_of(mesh), dtype, static=False)
        wire = wire_of(mesh)
        found, plan = trip(rank.rank, case, wire, dtype, static=True)
        assert len(found) == len(expected), seed
        for got, wanted in zip(found, expected, strict=True):
            # The results are not bit-equal, because a CPU rounds a product differently if the row moves in memory.
            bound = torch.finfo(dtype).eps * 32 * float(wanted.abs().max()) if wanted.numel() else 0.0
            torch.testing.assert_close(got, wanted, rtol=0, atol=bound)
        real, *pairs, padding, overflow = plan.sent_5.tolist()
        assert (real, *pairs) == (known.sent.rows_remote, known.sent.pairs, known.sent.pairs_remote)
        assert overflow == 0
        assert real + padding == sum(plan.rows.send)
        sent = sum(plan.rows.send) + sum(plan.rows.receive)  # dispatch and combine
        assert wire.comm_stats.payload_bytes == 2 * sent * HIDDEN * dtype.itemsize
    return len(seeds)


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [full(1, range(60)), (2, range(40)), full(4, range(40)), exhaustive(2, range(40, 300)), exhaustive(4, range(40, 200))],
    ids=str,
)
def test_the_same_bits_on_random_routings(run_in_world: Callable[..., list[Any]], world_size: int, seeds: range) -> None:
    """The cases include ranks without tokens or experts, batches of only null choices, and an expert that all tokens
    choose."""
    assert run_in_world(world_size, run_cases, seeds) == [len(seeds)] * world_size


class Shapes(TorchDispatchMode):
    """Records the order of operations, with the shapes of their inputs and outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen.append(
            (
                func.overloadpacket.__name__,
                *(each.shape for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)),
            )
        )
        return out


def passes(rank: RankContext, recompute: Any) -> list[tuple[list[str], list[str], list[Any]]]:
    """Runs forward and backward for mixed tokens, tokens of one group, and no tokens. Returns, for each of the three, the
    named syncs, all reads, and the shapes."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    wire, placement = wire_of(mesh), PLACEMENTS[rank.world_size]
    torch.manual_seed(rank.rank)
    dispatcher = StaticDispatcher(DispatchContext(placement, wire, tokens=T), room=WHOLE)
    options = {"placement": placement, "rank": rank.rank, "recompute": recompute, "storage": on_device}
    layer = capped_layer("position", dispatcher, **options)
    found = []
    mixed = torch.randint(-1, 2, (2, T))
    for group_T in (*mixed, torch.zeros(T, dtype=torch.int64), torch.full((T,), -1)):
        x_TD = torch.randn(T, D, requires_grad=True)
        wire.comm_stats.events = []
        with mock.patch.object(rows, "_host_order", rows._device_order), host_syncs() as seen, Shapes() as shapes:
            y_TD, _ = layer(x_TD, group_T)
            y_TD.sum().backward()
        found.append(([each for each in wire.comm_stats.events if each.startswith("sync")], seen, shapes.seen))
    return found


@pytest.mark.parametrize(("world_size", "recompute"), [(1, "experts"), (2, "none"), (2, "block")])
def test_nothing_is_read_and_no_shape_depends_on_the_routing(
    run_in_world: Callable[..., list[Any]], world_size: int, recompute: str
) -> None:
    """All passes have the same operations and shapes, so a CUDA graph of the first pass is valid for all later passes."""
    for found in run_in_world(world_size, passes, recompute):
        _, _, first = found[1]  # the first pass fills cached tables
        assert len(first) > 100
        for named, seen, shapes in found[1:]:
            assert (named, seen) == ([], [])
            assert shapes == first


def overflow(rank: RankContext) -> tuple[str, bool, str]:
    layout = Layout(2, 1, "pinned", room=1.0)
    with mock.patch.object(torch.optim.AdamW, "step") as updates:
        try:
            train(rank, layout)
        except ResourceError as error:
            message = str(error)
        else:
            message = "no error"
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    case = Case(((0,), (1,)), (np.ones((5, 1), np.int64),) * 2)
    chosen = torch.from_numpy(case.experts_TK[rank.rank])
    dispatcher = StaticDispatcher(DispatchContext(case.placement, wire_of(mesh), tokens=5), room=1.0)
    try:
        with torch.no_grad():
            dispatcher.plan(Assignments(torch.arange(5), chosen.flatten(), torch.ones(5)), 5)
    except RuntimeError as error:
        return message, updates.called, str(error)
    return message, updates.called, "no error"


def test_what_has_no_room_ends_the_run_before_a_weight_changes(run_in_world: Callable[..., list[Any]]) -> None:
    found = run_in_world(2, overflow)
    for message, updated, _ in found:
        assert "parallel.dispatch.kind=static: more rows or pairs than there is room for" in message
        assert "raise parallel.dispatch.room" in message
        assert not updated
    assert any("raise parallel.dispatch.room" in asserted for _, _, asserted in found)
