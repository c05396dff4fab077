"""Uneven all-to-all over one process group, counted, differentiable as one autograd node.

Shape letters: S rows this rank sends, R rows it receives, P pairs sent, Q pairs received, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.traffic import Traffic


@dataclass(frozen=True)
class Splits:
    """How many items go to, and come from, each rank of the group. The own rank's entries are 0: they stay at home."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(send=self.receive, receive=self.send)


class Wire:
    """One process group as a wire. Without a group it is the identity wire of a single rank: the same calls, no traffic."""

    def __init__(self, group: dist.ProcessGroup | None, traffic: Traffic) -> None:
        self.group = group
        self.traffic = traffic
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def exchange(self, items: Tensor, splits: Splits, *, name: str, payload: bool = False) -> Tensor:
        """Sends consecutive slices of `items` [sum(send), ...] to the ranks in order and returns [sum(receive), ...].

        Blocks the stream, not the host (on gloo the host too). All ranks of the group must call it, with whatever sizes,
        zero included: nothing is skipped on empty splits, since a peer may have something to send.
        """
        received = items.new_empty((sum(splits.receive), *items.shape[1:]))
        if self.group is None:
            return received
        remote = sum(splits.send) - splits.send[self.rank]  # the own slice is a local copy
        row_bytes = items.element_size() * items[:1].numel() if items.shape[0] else 0
        self.traffic.count(name, remote * row_bytes, payload=payload)
        with self.traffic.timed(items.device):
            dist.all_to_all_single(received, items.contiguous(), list(splits.receive), list(splits.send), group=self.group)
        return received


class _ExchangeRows(torch.autograd.Function):
    """Rows and pair weights one way, their gradients the other, always both and always in this order."""

    @staticmethod
    def forward(ctx: Any, rows_SD: Tensor, weights_P: Tensor, wire: Wire, rows: Splits, pairs: Splits) -> Any:
        ctx.wire, ctx.rows, ctx.pairs = wire, rows, pairs
        weights_Q = wire.exchange(weights_P, pairs, name="dispatch weights")
        rows_RD = wire.exchange(rows_SD, rows, name="dispatch rows", payload=True)
        return rows_RD, weights_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_rows_RD, grad_weights_Q = grads
        wire: Wire = ctx.wire
        grad_weights_P = wire.exchange(grad_weights_Q, ctx.pairs.reversed(), name="dispatch weights backward")
        grad_rows_SD = wire.exchange(grad_rows_RD, ctx.rows.reversed(), name="dispatch rows backward", payload=True)
        return grad_rows_SD, grad_weights_P, None, None, None


def exchange_rows(rows_SD: Tensor, weights_P: Tensor, wire: Wire, rows: Splits, pairs: Splits) -> tuple[Tensor, Tensor]:
    """Differentiable exchange of rows [S, D] and pair weights [P]: returns [R, D] and [Q].

    Two collectives forward and two backward, in one autograd node, so that every rank issues them in the same order.
    """
    return _ExchangeRows.apply(rows_SD, weights_P, wire, rows, pairs)  # pyright: ignore[reportReturnType]


def split_sizes(counts: Sequence[int], own: int) -> tuple[int, ...]:
    """`counts` with the own rank's entry set to 0."""
    return tuple(0 if rank == own else count for rank, count in enumerate(counts))
