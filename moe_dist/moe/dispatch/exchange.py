"""One hop of rows over one wire: rows of a table to other ranks, and sums of rows back into the table.

A dispatcher of several hops chains them: what arrived of one is the table of the next. Shape letters: M rows of the table,
D hidden size, S rows sent, O rows that stay on this rank, R = O + rows received, P pairs (sent, then own), Q pairs (own,
then received).

Sums are made in fp32 (float64 for float64 rows) and rounded once to the rows' dtype, in both directions, once a hop.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.moe.dispatch.rows import add_rows
from moe_dist.moe.routing import accumulation_dtype


@dataclass(frozen=True)
class Hop:
    """Which rows of a table go where; without gradient, and kept under recompute.

    Attributes:
        name: Of the wire, first word of every collective's name ("" for none).
        layer: Name of the layer, for records and reports.
        table_rows: M.
        rows, pairs: Split sizes of what is sent and received.
        row_S: int64, row of the table of each row sent, in sending order.
        row_O: int64, row of the table of each row that stays.
    """

    name: str
    layer: str
    table_rows: int
    rows: Splits
    pairs: Splits
    row_S: Tensor
    row_O: Tensor

    def call(self, what: str) -> str:
        """Name of one of the hop's collectives."""
        return f"{self.name} {what}".lstrip()


def dispatch_hop(table_MD: Tensor, weight_P: Tensor, wire: AllToAll, hop: Hop) -> tuple[Tensor, Tensor]:
    """Rows [M, D] and pair weights [P] over the hop: [R, D] and [Q]. One autograd node, two collectives each way."""
    return _DispatchHop.apply(table_MD, weight_P, wire, hop)  # pyright: ignore[reportReturnType]


def combine_hop(rows_RD: Tensor, wire: AllToAll, hop: Hop) -> Tensor:
    """Rows [R, D] back over the hop and summed into the table [M, D]; zero where no row came. One autograd node.

    Saves no tensor: under recompute of a whole block the recomputation ends before this exchange, which is not repeated.
    """
    return _CombineHop.apply(rows_RD, wire, hop)  # pyright: ignore[reportReturnType]


class _DispatchHop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_MD: Tensor, weight_P: Tensor, wire: AllToAll, hop: Hop) -> Any:
        ctx.wire, ctx.hop = wire, hop
        sent_P, own_P = weight_P.split([sum(hop.pairs.send), weight_P.shape[0] - sum(hop.pairs.send)])
        weights = wire.start(sent_P, hop.pairs, name=hop.call("dispatch weights"), layer=hop.layer)
        rows_RD = _rows_out(table_MD, wire, hop, "dispatch rows")
        return rows_RD, torch.cat([own_P, weights.wait()])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_RD, grad_Q = grads
        wire, hop = ctx.wire, ctx.hop
        own_rows, own_pairs = hop.row_O.shape[0], grad_Q.shape[0] - sum(hop.pairs.receive)
        weights = wire.start(
            grad_Q[own_pairs:], hop.pairs.reversed(), name=hop.call("dispatch weights backward"), layer=hop.layer
        )
        rows = wire.start(
            grad_RD[own_rows:], hop.rows.reversed(), name=hop.call("dispatch rows backward"), layer=hop.layer, payload=True
        )
        grad_P = torch.cat([weights.wait(), grad_Q[:own_pairs]])
        return _sum_back(grad_RD[:own_rows], rows.wait(), hop), grad_P, None, None


class _CombineHop(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, wire: AllToAll, hop: Hop) -> Tensor:
        ctx.wire, ctx.hop = wire, hop
        own = hop.row_O.shape[0]
        back = wire.exchange(
            rows_RD[own:], hop.rows.reversed(), name=hop.call("combine rows"), layer=hop.layer, payload=True
        )
        return _sum_back(rows_RD[:own], back, hop)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad_MD,) = grads
        wire, hop = ctx.wire, ctx.hop
        return _rows_out(grad_MD, wire, hop, "combine rows backward"), None, None


def _rows_out(table_MD: Tensor, wire: AllToAll, hop: Hop, what: str) -> Tensor:
    """Rows [R, D] of the table, own and received, each put where it stays; own rows are copied while the others fly."""
    own = hop.row_O.shape[0]
    rows_RD = table_MD.new_empty(own + sum(hop.rows.receive), table_MD.shape[1])
    send_SD = table_MD.index_select(0, hop.row_S)
    rows = wire.start(send_SD, hop.rows, name=hop.call(what), layer=hop.layer, payload=True, out=rows_RD[own:])
    torch.index_select(table_MD, 0, hop.row_O, out=rows_RD[:own])
    rows.wait()
    return rows_RD


def _sum_back(own_OD: Tensor, back_SD: Tensor, hop: Hop) -> Tensor:
    """Sums rows into the table [M, D] in fp32, rounded once to their dtype."""
    table = own_OD.new_zeros((hop.table_rows, own_OD.shape[1]), dtype=accumulation_dtype(own_OD.dtype))
    add_rows(table, hop.row_O, own_OD)
    add_rows(table, hop.row_S, back_SD)
    return table.to(own_OD.dtype)
