"""Dispatch and combine on real ranks: values, gradients, and ledger counts that equal the closed form exactly."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.errors import ResourceError
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.dispatch.interface import DispatchedRows, PairLayout
from moe_dist.moe.dispatch.pipelined import PipelinedDispatcher
from moe_dist.moe.dispatch.planning import SPLIT_SIZES
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.parallel.mesh import make_mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from tests.reference.layer import expected_traffic
from tests.support.cover import full
from tests.support.worlds import RankContext

D = 3
FORWARD = ["counts", "pair rows", "dispatch weights", "dispatch rows", "combine rows"]
EXCHANGES = ("counts", "pair rows", "dispatch", "combine")


@dataclass(frozen=True)
class Case:
    """One routing: the experts on each rank, and each rank's chosen experts per token (ABSENT for a null choice)."""

    slots: tuple[tuple[int, ...], ...]
    experts_TK: tuple[np.ndarray, ...]

    @property
    def placement(self) -> ExpertPlacement:
        num_experts = sum(len(slots) for slots in self.slots)
        return ExpertPlacement((ExpertGroup("all", num_experts, 0, 1, 4, 0, ("text",)),), self.slots)


def random_case(seed: int, world_size: int) -> Case:
    """Draws uneven placements and token counts, some ranks without experts or tokens, and any share of null choices."""
    rng = np.random.default_rng([seed, world_size])
    num_experts = int(rng.integers(1, 9))
    rank_of = rng.integers(0, world_size, num_experts)
    slots = tuple(tuple(np.flatnonzero(rank_of == rank).tolist()) for rank in range(world_size))
    kind = ("any", "all null", "one expert", "first half")[int(rng.integers(0, 4)) if seed % 3 == 0 else 0]
    rows = []
    for _ in range(world_size):
        tokens, top_k = int(rng.integers(0, 12)) if rng.random() < 0.8 else 0, int(rng.integers(1, num_experts + 1))
        pool = num_experts // 2 + 1 if kind == "first half" else num_experts
        chosen = np.array([rng.permutation(num_experts)[:top_k] for _ in range(tokens)], dtype=np.int64).reshape(
            tokens, top_k
        )
        chosen[(rng.random(chosen.shape) < rng.random()) | (chosen >= pool)] = ABSENT
        if kind == "all null":
            chosen[:] = ABSENT
        elif kind == "one expert":
            chosen[:] = ABSENT
            chosen[:, :1] = 0
        rows.append(chosen)
    return Case(slots, tuple(rows))


@dataclass(frozen=True)
class Timetable:
    """A mode of the all-to-all dispatcher. The plain mode is called in two steps, the other modes in one."""

    overlap: bool = False
    chunks: int = 1

    def forward_events(self) -> list[str]:
        """Returns the exchanges of a forward pass, in the order of their calls."""
        if self == Timetable():
            return FORWARD
        depart = [["dispatch weights" + name, "dispatch rows" + name] for name in self.names()]
        events = ["counts", "pair rows", *depart[0]]
        for index, name in enumerate(self.names()):
            events += [*(depart[index + 1] if index + 1 < self.chunks else []), "combine rows" + name]
        return events

    def backward_events(self) -> list[str]:
        """Returns the exchanges of a backward pass: chunks in reverse order, each overlapping with the next."""
        names = self.names()[::-1]
        events = ["combine rows backward" + names[0]]
        for index, name in enumerate(names):
            if index + 1 < self.chunks:
                events.append("combine rows backward" + names[index + 1])
            events += ["dispatch weights backward" + name, "dispatch rows backward" + name]
        return events

    def names(self) -> list[str]:
        return [f" {chunk}" for chunk in range(self.chunks)] if self.chunks > 1 else [""]


PLAIN = Timetable()


def run_case(rank: int, case: Case, wire: AllToAll, seed: int, timetable: Timetable = PLAIN) -> None:
    """Dispatches and combines a case, with 'experts' that multiply a row by expert id + 1."""
    chosen = torch.from_numpy(case.experts_TK[rank])
    num_tokens, top_k = chosen.shape
    generator = torch.Generator().manual_seed(seed * 100 + rank)
    h_TD = torch.randn(num_tokens, D, dtype=torch.double, generator=generator).requires_grad_()
    weight_N = torch.rand(num_tokens * top_k, dtype=torch.double, generator=generator).requires_grad_()
    assignments = Assignments(torch.arange(num_tokens).repeat_interleave(top_k), chosen.flatten(), weight_N)
    placement, comm_stats = case.placement, wire.comm_stats
    comm_stats.take()
    assert comm_stats.events is not None
    comm_stats.events.clear()

    def experts(dispatched: DispatchedRows, layout: PairLayout) -> torch.Tensor:
        factor_Q = factors(placement, rank, layout)
        pairs_QD = dispatched.rows_RD[layout.row_of_pair_Q] * (dispatched.weight_Q * factor_Q)[:, None]
        return torch.zeros_like(dispatched.rows_RD).index_add(0, layout.row_of_pair_Q, pairs_QD)

    if timetable == PLAIN:
        dispatcher = AllToAllDispatcher(DispatchContext(placement, wire))
        plan = dispatcher.plan(assignments, num_tokens)
        received = sum(plan.rows.receive)
        y_TD = dispatcher.combine(experts(dispatcher.dispatch(h_TD, weight_N, plan), plan), plan)
    else:
        pipelined = PipelinedDispatcher(
            DispatchContext(placement, wire), overlap=timetable.overlap, chunks=timetable.chunks
        )
        plan = pipelined.plan(assignments, num_tokens)
        received = sum(sum(chunk.rows.receive) for chunk in plan.chunks)
        y_TD, _ = pipelined.run(h_TD, weight_N, plan, experts=experts, shared=None, repeated=False)

    taken = assignments.taken()
    rows, pairs = expected_traffic(taken.token_N.tolist(), taken.expert_N.tolist(), placement.rank_of_expert, rank)
    assert plan.sent.rows_remote == rows
    assert plan.sent.pairs_remote == pairs
    assert plan.sent.pairs == len(taken.token_N)
    forward_bytes = (rows + received) * D * 8
    assert comm_stats.payload_bytes == forward_bytes

    scale_T = torch.zeros(num_tokens, dtype=torch.double)
    scale_T = scale_T.index_add(0, taken.token_N, taken.weight_N * (taken.expert_N + 1))
    expected = h_TD * scale_T[:, None]
    torch.testing.assert_close(y_TD, expected, rtol=0, atol=1e-12)
    direction = torch.randn(y_TD.shape, dtype=torch.double, generator=generator)
    theirs = torch.autograd.grad((expected * direction).sum(), [h_TD, weight_N])
    ours = torch.autograd.grad((y_TD * direction).sum(), [h_TD, weight_N])
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert comm_stats.payload_bytes == 2 * forward_bytes
    expected_events = [] if wire.group is None else timetable.forward_events() + timetable.backward_events()
    assert [event for event in comm_stats.events if event.startswith(EXCHANGES)] == expected_events
    assert sorted(event for event in comm_stats.events if event.startswith("wait")) == sorted(
        f"wait {name}" for name in expected_events
    )
    assert [event for event in comm_stats.events if event.startswith("sync")] == [f"sync {SPLIT_SIZES}"]


def factors(placement: ExpertPlacement, rank: int, plan: PairLayout) -> torch.Tensor:
    """Returns expert id + 1 of each pair that this rank computes, in slot order."""
    ids = torch.tensor(placement.slots[rank], dtype=torch.double) + 1
    return ids.repeat_interleave(torch.tensor(plan.slot_counts, dtype=torch.int64))


def run_cases(rank: RankContext, seeds: range, timetable: Timetable = PLAIN) -> int:
    """Runs random cases, and compares their total payload with 2 R D itemsize in each direction."""
    mesh = make_mesh(ep=rank.world_size, device=torch.device("cpu"), timeout=600.0)
    wire = AllToAll(mesh.ep if rank.world_size > 1 else None, CommStats(events=[]))
    for seed in seeds:
        run_case(rank.rank, random_case(seed, rank.world_size), wire, seed, timetable)
    return len(seeds)


TIMETABLES = [Timetable(overlap=True), Timetable(chunks=2), Timetable(True, 3)]


@pytest.mark.parametrize(
    ("world_size", "seeds"),
    [full(1, range(300)), (2, range(60)), (4, range(45)), full(2, range(60, 400)), full(4, range(45, 300))],
    ids=str,
)
def test_ledger_equals_the_closed_form_on_random_routings(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range
) -> None:
    """1,000 routings in all, with ranks without tokens or experts, batches of only null choices, and one expert that takes
    all tokens."""
    cases = [random_case(seed, world_size) for seed in seeds]
    assert any(all((c == ABSENT).all() for c in case.experts_TK) for case in cases)
    assert any(case.experts_TK[0].shape[0] == 0 for case in cases)
    if world_size > 1:
        assert any(() in case.slots for case in cases)
    assert run_in_world(world_size, run_cases, seeds) == [len(seeds)] * world_size


@pytest.mark.parametrize(
    ("world_size", "seeds", "timetable"),
    [
        (4, range(20), Timetable(True, 3)),
        *(full(4, range(20), timetable) for timetable in TIMETABLES[:2]),
        *(
            full(size, seeds, timetable)
            for size, seeds in ((1, range(20)), (2, range(20)), (2, range(20, 50)), (4, range(20, 45)))
            for timetable in TIMETABLES
        ),
    ],
    ids=str,
)
def test_so_it_does_on_every_timetable(
    run_in_world: Callable[..., list[Any]], world_size: int, seeds: range, timetable: Timetable
) -> None:
    """345 routings in all: same rows, bytes, values and gradients, and the same order of exchanges on all ranks."""
    assert run_in_world(world_size, run_cases, seeds, timetable) == [len(seeds)] * world_size


#   rank 0 holds experts 0 1 3, rank 1 holds expert 2, rank 2 holds none; x marks a null choice
#
#   rank 0   token 0 -> 0 2      own row 0, remote row to rank 1
#            token 1 -> 2 x      remote row to rank 1
#            token 2 -> x x      nothing
#   rank 1   token 0 -> 3 1      ONE row to rank 0 for both
#            token 1 -> 1 2      row to rank 0, own row 1
#   rank 2   no token
#
#   rank 0 computes, own rows first:  rows [t0 | r1.t0 r1.t1]      slots 0 1 3:  [t0] [r1.t0 r1.t1] [r1.t0]
#   rank 1 computes:                  rows [t1 | r0.t0 r0.t1]      slot  2:      [t1 r0.t0 r0.t1]
HAND = Case(
    slots=((0, 1, 3), (2,), ()),
    experts_TK=(
        np.array([[0, 2], [2, ABSENT], [ABSENT, ABSENT]]),
        np.array([[3, 1], [1, 2]]),
        np.zeros((0, 2), np.int64),
    ),
)


def plan_of_hand_case(rank: RankContext) -> dict[str, Any]:
    mesh = make_mesh(ep=3, device=torch.device("cpu"), timeout=600.0)
    chosen = torch.from_numpy(HAND.experts_TK[rank.rank])
    weights = torch.ones(chosen.numel())
    assignments = Assignments(torch.arange(chosen.shape[0]).repeat_interleave(2), chosen.flatten(), weights)
    plan = AllToAllDispatcher(DispatchContext(HAND.placement, AllToAll(mesh.ep, CommStats()))).plan(
        assignments, chosen.shape[0]
    )
    run_case(rank.rank, HAND, AllToAll(mesh.ep, CommStats(events=[])), 0)
    return {
        "rows": (plan.rows.send, plan.rows.receive),
        "pairs": (plan.pairs.send, plan.pairs.receive),
        "row tokens": plan.row_S.tolist(),
        "own tokens": plan.row_O.tolist(),
        "rows by slot": plan.row_of_pair_Q.tolist(),
        "slots": plan.slot_counts,
    }


def test_the_case_drawn_by_hand(run_in_world: Callable[..., list[Any]]) -> None:
    first, second, third = run_in_world(3, plan_of_hand_case)
    assert first == {
        "rows": ((0, 2, 0), (0, 2, 0)),
        "pairs": ((0, 2, 0), (0, 3, 0)),
        "row tokens": [0, 1],
        "own tokens": [0],
        "rows by slot": [0, 1, 2, 1],
        "slots": (1, 2, 1),
    }
    assert second == {
        "rows": ((2, 0, 0), (2, 0, 0)),
        "pairs": ((3, 0, 0), (2, 0, 0)),
        "row tokens": [0, 1],
        "own tokens": [1],
        "rows by slot": [0, 1, 2],
        "slots": (3,),
    }
    assert third == {
        "rows": ((0, 0, 0), (0, 0, 0)),
        "pairs": ((0, 0, 0), (0, 0, 0)),
        "row tokens": [],
        "own tokens": [],
        "rows by slot": [],
        "slots": (),
    }


def overflow(rank: RankContext) -> tuple[str, list[str]]:
    mesh = make_mesh(ep=2, device=torch.device("cpu"), timeout=600.0)
    case = Case(((0,), (1,)), (np.ones((5, 1), np.int64), np.ones((2, 1), np.int64)))
    chosen = torch.from_numpy(case.experts_TK[rank.rank])
    assignments = Assignments(torch.arange(len(chosen)), chosen.flatten(), torch.ones(len(chosen)))
    comm_stats = CommStats(events=[])
    # Rank 0 receives nothing, and without a bound would enter the next exchange alone.
    bound = 4 if rank.rank == 1 else -1
    dispatcher = AllToAllDispatcher(DispatchContext(case.placement, AllToAll(mesh.ep, comm_stats), max_receive_rows=bound))
    try:
        dispatcher.plan(assignments, len(chosen))
    except ResourceError as error:
        return str(error), comm_stats.events or []
    return "no error", comm_stats.events or []


def test_more_rows_than_the_bound_are_an_error_before_any_row_is_exchanged(
    run_in_world: Callable[..., list[Any]],
) -> None:
    message, events = run_in_world(2, overflow)[1]
    assert "would receive 5 rows" in message
    assert "parallel.max_receive_rows=4" in message
    assert events == ["counts", "wait counts", f"sync {SPLIT_SIZES}"]
