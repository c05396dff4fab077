"""What is computed while which rows are in flight, by the recorded order; and what the dispatcher syncs and holds."""

import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe_dist.comm.all_to_all import Wire
from moe_dist.comm.traffic import Traffic
from moe_dist.moe.dispatcher import DispatchedRows
from moe_dist.moe.per_rank import PerRankDispatcher
from moe_dist.moe.pipelined import PipelinedDispatcher
from moe_dist.moe.routing import Assignments
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.distributed.test_collective_order import recorded_pass
from tests.support.layouts import LAYERS, Layout
from tests.support.worlds import RankContext

T, E, K = 40, 6, 3


def events_of(run_in_world: Callable[..., list[Any]], layout: Layout) -> list[str]:
    """One forward and backward of the whole model; metadata left out, the same on all ranks."""
    everywhere = run_in_world(layout.world_size, recorded_pass, layout)
    wanted = ("dispatch rows", "combine rows", "wait dispatch rows", "wait combine rows", "own pairs", "shared", "pairs")
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
    forward = ["dispatch rows", "shared", "own pairs", "wait dispatch rows", "pairs", "combine rows", "wait combine rows"]
    assert events[: LAYERS * len(forward)] == forward * LAYERS
    backward = events[LAYERS * len(forward) :]
    half = len(backward) // LAYERS
    assert backward[:half] == backward[half:]
    start = ["combine rows backward", "wait combine rows backward", "pairs backward", "dispatch rows backward"]
    assert backward[: len(start)] == start
    assert sorted(backward[len(start) : half - 1]) == ["own pairs backward", "shared backward"]
    assert backward[half - 1] == "wait dispatch rows backward"


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


def test_a_recomputed_block_repeats_the_way_out_alone(run_in_world: Callable[..., list[Any]]) -> None:
    events = events_of(run_in_world, Layout(2, 1, "interleaved", "fsdp2", "block", overlap=True, chunks=2))
    for name, times in (("dispatch rows", 2), ("combine rows", 1), ("dispatch rows backward", 1)):
        for chunk in (" 0", " 1"):
            assert events.count(name + chunk) == events.count(f"wait {name}{chunk}") == times * LAYERS


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for values of the device: one entry for each operation that does."""

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


def whole_way(dispatcher: PerRankDispatcher | PipelinedDispatcher, rank: int, dim: int, *, backward: bool) -> Any:
    """Plan, dispatch, experts that do nothing, combine, and the gradients; returns the plan."""
    assignments, weight_N = assignments_of(rank)
    h_TD = torch.ones(T, dim).requires_grad_()
    plan: Any = dispatcher.plan(assignments, T)
    if isinstance(dispatcher, PipelinedDispatcher):
        run = dispatcher.run
        y_TD, _ = run(h_TD, weight_N, plan, experts=lambda rows, _: rows.rows_RD * 1, shared=None, repeated=False)
    else:
        y_TD = dispatcher.combine(dispatcher.dispatch(h_TD, weight_N, plan).rows_RD, plan)
    if backward:
        y_TD.backward(torch.ones_like(y_TD))
    return plan


def make(rank: RankContext, overlap: bool, chunks: int) -> PerRankDispatcher | PipelinedDispatcher:
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=60.0)
    placement = ExpertPlacement((ExpertGroup("all", E, 0, K, 4, 0, ("text",)),), ((0, 3), (1, 2, 4, 5)))
    wire = Wire(mesh.ep, Traffic(events=[]))
    if not overlap and chunks == 1:
        return PerRankDispatcher(placement, wire)
    return PipelinedDispatcher(placement, wire, overlap=overlap, chunks=chunks)


def syncs(rank: RankContext, overlap: bool, chunks: int) -> tuple[list[str], int, list[str]]:
    """Named syncs, lists read from tensors, and other operations that wait, in one forward and backward."""
    dispatcher = make(rank, overlap, chunks)
    whole_way(dispatcher, rank.rank, 4, backward=True)  # the placement's tables are made once
    events = dispatcher.lane.wire.traffic.events
    assert events is not None
    events.clear()
    lists, tolist = [], torch.Tensor.tolist
    with mock.patch.object(torch.Tensor, "tolist", lambda self: lists.append(1) or tolist(self)), Reads() as reads:
        whole_way(dispatcher, rank.rank, 4, backward=True)
    return [event for event in events if event.startswith("sync")], len(lists), reads.seen


@pytest.mark.parametrize(("overlap", "chunks"), [(False, 1), (True, 1), (False, 3), (True, 2)])
def test_one_host_sync_a_layer(run_in_world: Callable[..., list[Any]], overlap: bool, chunks: int) -> None:
    for named, lists, others in run_in_world(2, syncs, overlap, chunks):
        assert named == ["sync split sizes"]
        assert lists == 1
        assert others == []


class Live(TorchDispatchMode):
    """Bytes of storages that were made inside and are still alive, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(each, torch.Tensor):
                self._see(each.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        pointer, size = storage._cdata, storage.nbytes()
        if pointer not in self._known:
            self._known.add(pointer)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._drop, pointer, size)

    def _drop(self, pointer: int, size: int) -> None:
        self._known.discard(pointer)
        self.now -= size


def held(rank: RankContext) -> list[dict[str, int]]:
    """Bytes at two widths: at most in forward and in backward, kept by autograd, and the sizes of the formula."""
    dispatcher = make(rank, overlap=False, chunks=1)
    assert isinstance(dispatcher, PerRankDispatcher)
    found = []
    for dim in (64, 192):
        assignments, weight_N = assignments_of(rank.rank)
        h_TD, grad_TD = torch.ones(T, dim).requires_grad_(), torch.ones(T, dim)
        plan = dispatcher.plan(assignments, T)
        dispatcher.lane.buffers.clear()
        kept: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept.append(tensor.nbytes)  # noqa: B023
            return tensor

        with Live() as forward, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            rows: DispatchedRows | None = dispatcher.dispatch(h_TD, weight_N, plan)
            given_back = dispatcher.lane.buffers.num_bytes
            y_TD = dispatcher.combine(rows.rows_RD, plan)
            rows = None
        with Live() as backward:
            y_TD.backward(grad_TD)
        num_own, received, sent = len(plan.token_of_row_O), sum(plan.rows.receive), plan.num_remote_rows
        found.append(
            {
                "forward": forward.peak,
                "backward": backward.peak,
                "kept": sum(kept),
                "R": num_own + received,
                "S": sent,
                "buffers": dispatcher.lane.buffers.num_bytes,
                "given back": given_back,
                "D": dim,
            }
        )
    return found


def test_memory_is_as_stated(run_in_world: Callable[..., list[Any]]) -> None:
    """What grows with D, exactly: R + S + T rows in each direction, S of them in the buffer that all exchanges share."""
    for narrow, wide in run_in_world(2, held):
        added = (wide["D"] - narrow["D"]) * 4
        assert wide["forward"] - narrow["forward"] == (wide["R"] + wide["S"] + T) * added
        assert wide["backward"] - narrow["backward"] == (wide["R"] + wide["S"] + T) * added
        assert wide["kept"] == 0
        assert wide["given back"] == wide["buffers"] == wide["S"] * wide["D"] * 4
