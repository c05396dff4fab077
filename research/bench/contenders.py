"""Makes the contenders of the dispatch benchmark. A contender is a function without arguments, which is timed. It is made
from a case: the routing and rows of a measured point on this rank. "Ours" is moe_dist's dispatcher. Each of a token's K
choices is an expert or null; a pair is a (token, expert) choice.

The following contenders bring token rows to the ranks of the chosen experts and back, without sorting rows by expert:

    floor               runs two all_to_all_single of exactly the rows that our dispatcher sends, and one copy before each
    floor, all          runs `floor`, and two copies of the rows whose experts are on this rank
    dispatch, combine   runs our dispatch and combine; the plan is not timed
    ours at rank        runs our plan, dispatch and combine

The following contenders sort rows by expert, and bring weighted sums back to the tokens (each expert is the identity):

    ours                runs our plan and dispatch, a copy of one row for each pair by expert, a weighted sum, and combine
    megatron, ...       see megatron_variants.py
    naive               sends one row for each choice, null or not, even to this rank; written in a few lines of torch
    per pair            runs `naive` without the null choices
    equal active        runs `ours` on another routing: as many pairs, spread evenly over the tokens, no null choices

Shape letters: T tokens, D hidden size, K choices per token, N rows of a rank's choices.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.dispatch.all_to_all import AllToAllDispatcher
from moe_dist.moe.dispatch.context import DispatchContext
from moe_dist.moe.kernels.torch_kernels import gather_rows, weighted_row_sum
from moe_dist.moe.routing.types import ABSENT, Assignments
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import ExpertGroup, ExpertPlacement
from research.bench.points import Point, draw, slots

Run = Callable[[], Tensor]


@dataclass
class Case:
    """The routing and rows of one point on this rank. `research.bench.points.Choices` explains the choices [T, K]."""

    point: Point
    mesh: Mesh
    placement: ExpertPlacement
    h_TD: Tensor
    drawn_TK: Tensor
    taken_TK: Tensor
    weight_TK: Tensor
    taken: Assignments  # `taken_TK` as (token, expert) pairs, the form that our dispatcher needs
    equal_active: Assignments
    dispatcher: AllToAllDispatcher

    @property
    def group(self) -> dist.ProcessGroup:
        assert self.mesh.ep is not None, "an exchange needs two ranks"
        return self.mesh.ep


def make_case(point: Point, mesh: Mesh, *, seed: int) -> Case:
    """Draws a point's routing and rows for this rank."""
    choices = draw(point, rank=mesh.ep_rank, world_size=mesh.ep_size, seed=seed)
    group = ExpertGroup("all", point.experts, 0, point.top_k, 1, 0, ("text",))
    placement = ExpertPlacement((group,), slots(point, mesh.ep_size))
    generator = torch.Generator().manual_seed(seed * 1000 + mesh.ep_rank)
    drawn, taken, equal = (torch.from_numpy(each) for each in (choices.drawn_TK, choices.taken_TK, choices.equal_active_TK))
    weight = torch.from_numpy(choices.weight_TK)
    return Case(
        point=point,
        mesh=mesh,
        placement=placement,
        h_TD=torch.randn(len(drawn), point.hidden, generator=generator),
        drawn_TK=drawn,
        taken_TK=taken,
        weight_TK=weight,
        taken=assignments_of(taken, weight),
        equal_active=assignments_of(equal, weight[:, : equal.shape[1]].contiguous()),
        dispatcher=AllToAllDispatcher(DispatchContext(placement, AllToAll(mesh.ep, CommStats()))),
    )


def assignments_of(expert_TK: Tensor, weight_TK: Tensor) -> Assignments:
    """Turns choices into the (token, expert) pairs that our dispatcher takes."""
    tokens, top_k = expert_TK.shape
    weight_TK = torch.where(expert_TK == ABSENT, 0.0, weight_TK)
    return Assignments(torch.arange(tokens).repeat_interleave(top_k), expert_TK.flatten(), weight_TK.flatten())


def floor(case: Case, *, own_rows: bool) -> Run:
    """Makes the contender `floor`, or `floor, all` if `own_rows` is true. Buffers are allocated before the timed part,
    which only copies and exchanges rows."""
    plan = case.dispatcher.plan(case.taken, case.h_TD.shape[0])  # costs two metadata collectives and one host sync
    send, receive = list(plan.rows.send), list(plan.rows.receive)
    num_own = plan.row_O.shape[0] if own_rows else 0
    source, own = (case.h_TD.new_zeros(rows, case.point.hidden) for rows in (sum(send), num_own))
    outgoing, back, own_out, own_back = (torch.empty_like(each) for each in (source, source, own, own))
    incoming = case.h_TD.new_empty(sum(receive), case.point.hidden)
    returning = torch.empty_like(incoming)

    def run() -> Tensor:
        outgoing.copy_(source)
        own_out.copy_(own)
        dist.all_to_all_single(incoming, outgoing, receive, send, group=case.group)
        returning.copy_(incoming)
        own_back.copy_(own_out)
        dist.all_to_all_single(back, returning, send, receive, group=case.group)
        return back

    return run


def at_rank(case: Case, *, planned: bool) -> Run:
    """Makes a contender with our plan, dispatch and combine. With `planned`, the plan is made before the timed part. Making
    it costs two metadata collectives and one host sync."""
    kept = case.dispatcher.plan(case.taken, case.h_TD.shape[0]) if planned else None

    def run() -> Tensor:
        plan = kept or case.dispatcher.plan(case.taken, case.h_TD.shape[0])
        return case.dispatcher.combine(case.dispatcher.dispatch(case.h_TD, case.taken.weight_N, plan).rows_RD, plan)

    return run


def ours(case: Case, assignments: Assignments) -> Run:
    """Makes the contender with our plan, dispatch, sorting by expert, weighted sum and combine."""

    def run() -> Tensor:
        plan = case.dispatcher.plan(assignments, case.h_TD.shape[0])
        dispatched = case.dispatcher.dispatch(case.h_TD, assignments.weight_N, plan)
        pairs_QD = gather_rows(dispatched.rows_RD, plan.row_of_pair_Q)  # copies one row for each (token, expert) pair
        rows_RD = weighted_row_sum(pairs_QD, dispatched.weight_Q, plan.row_of_pair_Q, dispatched.rows_RD.shape[0])
        return case.dispatcher.combine(rows_RD.to(pairs_QD.dtype), plan)

    return run


def naive(case: Case, *, nulls: bool) -> Run:
    """Makes a contender that sends one row for each choice. With `nulls`, a null choice is also sent, with weight 0, to the
    expert that was drawn before the choice became null."""
    rank_E, slot_E = torch.tensor(case.placement.rank_of_expert), torch.tensor(case.placement.slot_of_expert)
    size, top_k = case.mesh.ep_size, case.point.top_k

    def run() -> Tensor:
        choice_N = (case.drawn_TK if nulls else case.taken_TK).flatten()
        weight_N = torch.where(case.taken_TK == ABSENT, 0.0, case.weight_TK).flatten()
        token_N = torch.arange(case.h_TD.shape[0]).repeat_interleave(top_k)
        if not nulls:
            kept_N = choice_N != ABSENT
            choice_N, weight_N, token_N = choice_N[kept_N], weight_N[kept_N], token_N[kept_N]
        order_N = torch.argsort(rank_E[choice_N] * case.point.experts + slot_E[choice_N], stable=True)
        send = torch.bincount(rank_E[choice_N], minlength=size)
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=case.group)
        splits = receive.tolist(), send.tolist()  # two host syncs, because split sizes are Python numbers
        token_N = token_N[order_N]
        rows = _swap(case.h_TD[token_N], *splits, case.group)
        slot = _swap(slot_E[choice_N][order_N], *splits, case.group)
        weight = _swap(weight_N[order_N], *splits, case.group)
        by_expert = torch.argsort(slot, stable=True)
        outputs = rows[by_expert] * weight[by_expert, None]
        returning = torch.empty_like(outputs)
        returning[by_expert] = outputs
        back = _swap(returning, splits[1], splits[0], case.group)
        return torch.zeros_like(case.h_TD).index_add_(0, token_N, back)

    return run


def _swap(items: Tensor, receive: list[int], send: list[int], group: dist.ProcessGroup) -> Tensor:
    received = items.new_empty((sum(receive), *items.shape[1:]))
    dist.all_to_all_single(received, items, receive, send, group=group)
    return received


def expected(case: Case, assignments: Assignments) -> Tensor:
    """Returns the right result for contenders that sort rows by expert: each token's row times the sum of its weights."""
    scale_T = torch.zeros(case.h_TD.shape[0]).index_add_(0, assignments.token_N, assignments.weight_N)
    return case.h_TD * scale_T[:, None]
