"""The four exchanges of rows, each in two halves: made when it is issued, `land`ed where its rows are needed.

    RowsOut          rows and pair weights to the experts                      forward of dispatch
    RowsHome         their sums back to the tokens                             forward of combine
    GradientsOut     gradients of y to where the sums were made                backward of combine
    GradientsHome    gradients of rows and weights back to the tokens          backward of dispatch

What concerns own rows is done between the halves, while the remote ones are in flight. Buffers of S rows come from
`RowBuffers` and go back when the exchange has landed; no backward reads them. Shape letters: T tokens, D hidden size,
N assignments, S remote rows sent, O rows of the own rank, R = O + rows received, P pairs of tokens, Q pairs computed here.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_dist.comm.all_to_all import AllToAll, Pending, RowBuffers
from moe_dist.moe.dispatch.plan import AllToAllPlan
from moe_dist.moe.dispatch.rows import add_rows
from moe_dist.moe.routing import accumulation_dtype


@dataclass(frozen=True)
class Lane:
    """A wire, and the buffers that all exchanges on it share."""

    wire: AllToAll
    buffers: RowBuffers = field(default_factory=RowBuffers)


class RowsOut:
    """Rows h[token] and their pairs' weights, to the experts."""

    def __init__(self, h_TD: Tensor, weight_N: Tensor, plan: AllToAllPlan, lane: Lane) -> None:
        self.plan, self.lane = plan, lane
        num_own = plan.token_of_row_O.shape[0]
        weight_P = weight_N.index_select(0, plan.pair_P)
        self.own_weight = weight_P[plan.num_remote_pairs :]
        self.weights = _start(lane, weight_P[: plan.num_remote_pairs], plan, "dispatch weights")
        self.send = lane.buffers.take(plan.token_of_row_S.shape[0], h_TD)
        torch.index_select(h_TD, 0, plan.token_of_row_S, out=self.send)
        self.rows_RD = h_TD.new_empty(num_own + sum(plan.rows.receive), h_TD.shape[1])
        self.rows = _start(lane, self.send, plan, "dispatch rows", out=self.rows_RD[num_own:])
        torch.index_select(h_TD, 0, plan.token_of_row_O, out=self.rows_RD[:num_own])

    def land(self) -> tuple[Tensor, Tensor]:
        """Rows [R, D] (own, then received) and weights [Q] in slot order."""
        weight_Q = torch.cat([self.own_weight, self.weights.wait()]).index_select(0, self.plan.order_Q)
        self.rows.wait()
        self.lane.buffers.give(self.send)
        return self.rows_RD, weight_Q


class RowsHome:
    """Sums of the rows, back to their tokens."""

    def __init__(self, rows_RD: Tensor, plan: AllToAllPlan, lane: Lane) -> None:
        self.plan, self.lane, self.rows_RD = plan, lane, rows_RD
        self.back = lane.buffers.take(plan.token_of_row_S.shape[0], rows_RD)
        remote = rows_RD[plan.token_of_row_O.shape[0] :]
        self.rows = _start(lane, remote, plan, "combine rows", out=self.back, home=True)

    def land(self, base_TD: Tensor | None = None) -> Tensor:
        """y [T, D], summed in fp32 and rounded once; `base_TD` [T, D] is added where given."""
        rows_RD, plan = self.rows_RD, self.plan
        dtype = accumulation_dtype(rows_RD.dtype)
        if base_TD is None:
            y_TD = rows_RD.new_zeros((plan.num_tokens, rows_RD.shape[1]), dtype=dtype)
        else:
            y_TD = base_TD.to(dtype, copy=True)
        add_rows(y_TD, plan.token_of_row_O, rows_RD[: plan.token_of_row_O.shape[0]])
        add_rows(y_TD, plan.token_of_row_S, self.rows.wait())
        self.lane.buffers.give(self.back)
        return y_TD.to(rows_RD.dtype)


class GradientsOut:
    """Gradients of y, to the ranks that made its sums."""

    def __init__(self, grad_TD: Tensor, plan: AllToAllPlan, lane: Lane) -> None:
        self.plan, self.lane = plan, lane
        num_own = plan.token_of_row_O.shape[0]
        self.send = lane.buffers.take(plan.token_of_row_S.shape[0], grad_TD)
        torch.index_select(grad_TD, 0, plan.token_of_row_S, out=self.send)
        self.grad_RD = grad_TD.new_empty(num_own + sum(plan.rows.receive), grad_TD.shape[1])
        self.rows = _start(lane, self.send, plan, "combine rows backward", out=self.grad_RD[num_own:])
        torch.index_select(grad_TD, 0, plan.token_of_row_O, out=self.grad_RD[:num_own])

    def land(self) -> Tensor:
        """Gradient of the sums, [R, D]."""
        self.rows.wait()
        self.lane.buffers.give(self.send)
        return self.grad_RD


class GradientsHome:
    """Gradients of the rows and of the pairs' weights, back to their tokens and assignments."""

    def __init__(self, grad_RD: Tensor, grad_weight_Q: Tensor, plan: AllToAllPlan, lane: Lane) -> None:
        self.plan, self.lane, self.grad_RD = plan, lane, grad_RD
        num_own, num_own_pairs = plan.token_of_row_O.shape[0], plan.num_pairs - plan.num_remote_pairs
        arrived_Q = torch.empty_like(grad_weight_Q).index_copy_(0, plan.order_Q, grad_weight_Q)
        self.own_weight = arrived_Q[:num_own_pairs]
        self.weights = _start(lane, arrived_Q[num_own_pairs:], plan, "dispatch weights backward", home=True)
        self.back = lane.buffers.take(plan.token_of_row_S.shape[0], grad_RD)
        self.rows = _start(lane, grad_RD[num_own:], plan, "dispatch rows backward", out=self.back, home=True)

    def land(self, num_assignments: int) -> tuple[Tensor, Tensor]:
        """Gradients of h [T, D], summed in fp32 and rounded once, and of the weights [N]."""
        plan, grad_RD = self.plan, self.grad_RD
        dtype = accumulation_dtype(grad_RD.dtype)
        grad_TD = grad_RD.new_zeros((plan.num_tokens, grad_RD.shape[1]), dtype=dtype)
        add_rows(grad_TD, plan.token_of_row_O, grad_RD[: plan.token_of_row_O.shape[0]])
        weight_P = torch.cat([self.weights.wait(), self.own_weight])
        grad_weight_N = weight_P.new_zeros(num_assignments).index_copy_(0, plan.pair_P, weight_P)
        add_rows(grad_TD, plan.token_of_row_S, self.rows.wait())
        self.lane.buffers.give(self.back)
        return grad_TD.to(grad_RD.dtype), grad_weight_N


def _start(
    lane: Lane, items: Tensor, plan: AllToAllPlan, name: str, *, out: Tensor | None = None, home: bool = False
) -> Pending:
    """Issues one exchange of a plan: rows (where there is a buffer for them) or pair weights."""
    splits = plan.pairs if out is None else plan.rows
    return lane.wire.start(
        items,
        splits.reversed() if home else splits,
        name=name + plan.chunk,
        layer=plan.layer,
        payload=out is not None,
        out=out,
    )
