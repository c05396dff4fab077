"""The recorded order shows which computations overlap with which exchanges, and how often the dispatcher syncs with the
host."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.comm.names import BACKWARD, COMBINE_ROWS, DISPATCH_ROWS, REPLICAS
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.planning import SPLIT_SIZES
from moe_dist.moe.routing.types import Assignments
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.distributed.test_collective_order import recorded_pass
from tests.support.layouts import LAYERS, Layout
from tests.support.worlds import RankContext

T, E, K = 40, 6, 3


def events_of(run_in_world: Callable[..., list[Any]], layout: Layout) -> list[str]:
    """Returns the events of one forward and backward of the whole model, without metadata exchanges. Exchanges of rows come
    in the same order on all ranks."""
    everywhere = run_in_world(layout.world_size, recorded_pass, layout)
    exchanged = (DISPATCH_ROWS, COMBINE_ROWS, REPLICAS)
    wanted = (*exchanged, *(f"wait {name}" for name in exchanged), "own pairs", "shared", "pairs")
    kept = [[event for event in events if event.startswith(wanted)] for events in everywhere]
    for events in kept:
        assert [e for e in events if "rows" in e] == [e for e in kept[0] if "rows" in e]
    return kept[-1]


@pytest.mark.parametrize("data", ["ddp", "fsdp2"])
@pytest.mark.parametrize("recompute", ["none", "experts"])
def test_own_pairs_and_the_shared_expert_are_computed_while_rows_fly(
    run_in_world: Callable[..., list[Any]], data: str, recompute: str
) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", data, recompute, overlap=True))
    forward = [DISPATCH_ROWS, "shared", "own pairs", f"wait {DISPATCH_ROWS}", "pairs", COMBINE_ROWS, f"wait {COMBINE_ROWS}"]
    assert events[: LAYERS * len(forward)] == forward * LAYERS
    backward = events[LAYERS * len(forward) :]
    half = len(backward) // LAYERS
    assert backward[:half] == backward[half:]
    start = [COMBINE_ROWS + BACKWARD, f"wait {COMBINE_ROWS}{BACKWARD}", "pairs backward", DISPATCH_ROWS + BACKWARD]
    assert backward[: len(start)] == start
    assert sorted(backward[len(start) : half - 1]) == ["own pairs backward", "shared backward"]
    assert backward[half - 1] == f"wait {DISPATCH_ROWS}{BACKWARD}"


def test_a_chunk_is_dispatched_while_the_one_before_is_computed(run_in_world: Callable[..., list[Any]]) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", "fsdp2", chunks=3))
    forward = [
        "dispatch rows 0", "dispatch rows 1",
        "wait dispatch rows 0", "pairs 0", "combine rows 0", "dispatch rows 2",
        "wait dispatch rows 1", "pairs 1", "wait combine rows 0", "combine rows 1",
        "wait dispatch rows 2", "pairs 2", "wait combine rows 1", "combine rows 2", "wait combine rows 2",
    ]  # fmt: skip
    backward = [
        "combine rows backward 2", "wait combine rows backward 2", "combine rows backward 1",
        "pairs 2 backward", "dispatch rows backward 2", "wait combine rows backward 1", "combine rows backward 0",
        "pairs 1 backward", "dispatch rows backward 1", "wait dispatch rows backward 2", "wait combine rows backward 0",
        "pairs 0 backward", "dispatch rows backward 0", "wait dispatch rows backward 1", "wait dispatch rows backward 0",
    ]  # fmt: skip
    assert events == forward * LAYERS + backward * LAYERS


def test_weights_of_replicas_are_exchanged_once_around_all_chunks(run_in_world: Callable[..., list[Any]]) -> None:
    """Both groups send replica weights before the rows, and the shared expert overlaps with them. In backward the replicas'
    gradients follow the rows."""
    events = events_of(run_in_world, Layout(2, 1, "interleaved", overlap=True, chunks=2, replicas=True))
    forward = [
        REPLICAS, REPLICAS, "dispatch rows 0", "dispatch rows 1", "shared", "own pairs",
        f"wait {REPLICAS}", f"wait {REPLICAS}", "wait dispatch rows 0",
        "pairs 0", "combine rows 0", "wait dispatch rows 1", "pairs 1", "wait combine rows 0", "combine rows 1",
        "wait combine rows 1",
    ]  # fmt: skip
    backward = [
        "combine rows backward 1", "wait combine rows backward 1", "combine rows backward 0", "pairs 1 backward",
        "dispatch rows backward 1", "wait combine rows backward 0", "pairs 0 backward", "dispatch rows backward 0",
        "own pairs backward", "shared backward", "wait dispatch rows backward 1", "wait dispatch rows backward 0",
        *[REPLICAS + BACKWARD, f"wait {REPLICAS}{BACKWARD}"] * 2,
    ]  # fmt: skip
    assert events == forward * LAYERS + backward * LAYERS


def test_a_recomputed_block_repeats_the_way_out_alone(run_in_world: Callable[..., list[Any]]) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", "fsdp2", "block", overlap=True, chunks=2))
    for name, times in ((DISPATCH_ROWS, 2), (COMBINE_ROWS, 1), (DISPATCH_ROWS + BACKWARD, 1)):
        for chunk in (" 0", " 1"):
            assert events.count(name + chunk) == events.count(f"wait {name}{chunk}") == times * LAYERS


class Reads(TorchDispatchMode):
    """Records the operations for which the host waits for values of the device."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        boolean = name.startswith("index") and any(
            isinstance(each, (list, tuple)) and any(getattr(t, "dtype", None) == torch.bool for t in each) for each in args
        )
        spread = name == "repeat_interleave" and (kwargs or {}).get("output_size") is None
        if name.startswith(self.WAITING) or boolean or spread:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def assignments_of(rank: int) -> tuple[Assignments, torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    chosen_TK = torch.rand(T, E, generator=generator).topk(K).indices
    chosen_TK.masked_fill_(torch.rand(T, K, generator=generator) < 0.4, -1)
    weight_N = torch.rand(T * K, generator=generator).requires_grad_()
    return Assignments(torch.arange(T).repeat_interleave(K), chosen_TK.flatten(), weight_N), weight_N


def whole_way(dispatcher: AllToAllDispatcher | PipelinedDispatcher, rank: int, dim: int, *, backward: bool) -> Any:
    """Runs plan, dispatch, experts that copy their rows, combine, and backward. Returns the plan."""
    assignments, weight_N = assignments_of(rank)
    h_TD = torch.ones(T, dim).requires_grad_()
    plan: Any = dispatcher.plan(assignments, T)
    y_TD, _ = dispatcher.run(h_TD, weight_N, plan, experts=lambda rows, _: rows.rows_RD * 1)
    if backward:
        y_TD.backward(torch.ones_like(y_TD))
    return plan


def make(rank: RankContext, overlap: bool, chunks: int) -> AllToAllDispatcher | PipelinedDispatcher:
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    placement = ExpertPlacement((ExpertGroup("all", E, 0, K, 4, 0, ("text",)),), ((0, 3), (1, 2, 4, 5)))
    wire = AllToAll(mesh.ep, CommStats(events=[]))
    if not overlap and chunks == 1:
        return AllToAllDispatcher(DispatchContext(placement, wire))
    return PipelinedDispatcher(DispatchContext(placement, wire), overlap=overlap, chunks=chunks)


def syncs(rank: RankContext, overlap: bool, chunks: int) -> tuple[list[str], int, list[str]]:
    """Returns the named syncs, the number of lists read from tensors, and other waiting operations of one forward and
    backward."""
    dispatcher = make(rank, overlap, chunks)
    whole_way(dispatcher, rank.rank, 4, backward=True)  # the first pass makes the placement's tables
    events = dispatcher.exchange.all_to_all.comm_stats.events
    assert events is not None
    events.clear()
    lists, tolist = [], torch.Tensor.tolist
    with mock.patch.object(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self)), Reads() as reads:
        whole_way(dispatcher, rank.rank, 4, backward=True)
    return [event for event in events if event.startswith("sync")], len(lists), reads.seen


@pytest.mark.parametrize(("overlap", "chunks"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_one_host_sync_a_layer(run_in_world: Callable[..., list[Any]], overlap: bool, chunks: int) -> None:
    for named, lists, others in run_in_world(2, syncs, overlap, chunks):
        assert named == [f"sync {SPLIT_SIZES}"]
        assert lists == 1
        assert others == []
