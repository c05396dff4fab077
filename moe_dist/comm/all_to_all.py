"""Uneven all-to-all over one process group: counted, in flight until it is waited for, and as one autograd node.

Shape letters: S rows this rank sends, R rows it receives, P pairs sent, Q pairs received, D hidden size.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker, track_collective


class RowBuffers:
    """A free list of flat storages, as many as were ever in use at once; each grows to the largest that was asked of it.

    Only what no backward reads may be taken here: rows on their way out, which the collective has read when it ends, and
    rows that arrive to be added to others. A fresh allocation of this size costs the host one page fault for each 4 KiB,
    more than the copy into it; on CUDA the caching allocator would do as well.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """Uninitialised rows [num_rows, D] with the width, dtype and device of `like` [*, D]."""
        width = like.shape[-1]
        num_bytes = num_rows * width * like.element_size()
        for index, storage in enumerate(self._free):
            if storage.device == like.device:
                del self._free[index]
                break
        else:
            storage = torch.empty(0, dtype=torch.uint8, device=like.device)
        if storage.shape[0] < num_bytes:
            storage = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        return storage[:num_bytes].view(like.dtype).view(num_rows, width)

    def give(self, rows: Tensor) -> None:
        """Takes rows back; their values may change from now on."""
        storage = rows.untyped_storage()
        self._free.append(torch.empty(0, dtype=torch.uint8, device=rows.device).set_(storage, 0, (storage.nbytes(),)))  # pyright: ignore

    def clear(self) -> None:
        """Forgets the storages that are free now."""
        self._free.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages that are free now."""
        return sum(storage.untyped_storage().nbytes() for storage in self._free)


@dataclass(frozen=True)
class Splits:
    """How many items go to, and come from, each rank of the group. The own rank's entries are 0: they stay at home."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(send=self.receive, receive=self.send)


class Pending:
    """An all-to-all that was issued. Until it has been waited for, its items must not change and its result is undefined.

    Attributes:
        layer, name: Which layer issued it, and what it carries.
        splits: Its sizes.
    """

    def __init__(
        self,
        *,
        layer: str,
        name: str,
        splits: Splits,
        received: Tensor,
        comm_stats: CommStats,
        tracker: CollectiveTracker | None = None,
    ) -> None:
        self.layer = layer
        self.name = name
        self.splits = splits
        self._received = received
        self._traffic = comm_stats
        self._watch = tracker
        self._work: dist.Work | None = None
        self._items: Tensor | None = None  # the collective reads it until it has ended
        self._waited = False

    def issue(self, items: Tensor, group: dist.ProcessGroup) -> None:
        """Starts the collective; the wire calls it once."""
        self._items = items
        with self._traffic.timed_call(items.device), self._watched():
            self._work = dist.all_to_all_single(
                self._received, items, list(self.splits.receive), list(self.splits.send), group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """What arrived, [sum(receive), ...]. Blocks the stream, not the host (on gloo the host). Once a call."""
        if self._waited:
            raise AssertionError(f"{self.name} of {self.layer or 'a layer'} has been waited for already")
        if self._work is not None:
            self._traffic.event(f"wait {self.name}")
            with self._traffic.timed(self._received.device), self._watched():
                self._work.wait()
        self._waited, self._items = True, None
        return self._received

    def _watched(self) -> AbstractContextManager[None]:
        """For the watchdog: in the call too, since a first call may have to meet its peers. While only the device is at
        work the rank itself is in no collective."""
        return track_collective(
            self._watch,
            self.name,
            device=self._received.device,
            layer=self.layer,
            send=self.splits.send,
            receive=self.splits.receive,
        )


class AllToAll:
    """One process group as a wire. Without a group it is the identity wire of a single rank: the same calls, no traffic.

    Args:
        tracker: Where its collectives are noted, for the watchdog.
        between_nodes: Its ranks are on different nodes; its payload is counted apart as well.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        comm_stats: CommStats,
        tracker: CollectiveTracker | None = None,
        *,
        between_nodes: bool = False,
    ) -> None:
        self.group = group
        self.comm_stats = comm_stats
        self.tracker = tracker
        self.between_nodes = between_nodes
        self.size = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)

    def start(
        self,
        items: Tensor,
        splits: Splits,
        *,
        name: str,
        layer: str = "",
        payload: bool = False,
        out: Tensor | None = None,
    ) -> Pending:
        """Issues the exchange of consecutive slices of `items` [sum(send), ...] to the ranks in order, and returns at once.

        Counted here, at the call. All ranks of the group must call it in the same order, with whatever sizes, zero
        included: nothing is skipped on empty splits, since a peer may have something to send.

        Args:
            name, layer: What is carried, and for which layer: for records, and for a report of what hangs.
            payload: Rows, in contrast to metadata.
            out: Contiguous tensor [sum(receive), ...] that receives; a new one if None.
        """
        received = items.new_empty((sum(splits.receive), *items.shape[1:])) if out is None else out
        pending = Pending(
            layer=layer, name=name, splits=splits, received=received, comm_stats=self.comm_stats, tracker=self.tracker
        )
        if self.group is None:
            return pending
        remote = sum(splits.send) - splits.send[self.rank]  # the own slice is a local copy
        row_bytes = items.element_size() * items[:1].numel() if items.shape[0] else 0
        self.comm_stats.count(name, remote * row_bytes, payload=payload, between_nodes=self.between_nodes)
        pending.issue(items.contiguous(), self.group)
        return pending

    def exchange(self, items: Tensor, splits: Splits, *, name: str, layer: str = "", payload: bool = False) -> Tensor:
        """`start`, and wait for it: returns what arrived, [sum(receive), ...]."""
        return self.start(items, splits, name=name, layer=layer, payload=payload).wait()


class _ExchangeRows(torch.autograd.Function):
    """Rows and pair weights one way, their gradients the other, always both and always in this order."""

    @staticmethod
    def forward(
        ctx: Any, rows_SD: Tensor, weights_P: Tensor, wire: AllToAll, rows: Splits, pairs: Splits, layer: str
    ) -> Any:
        ctx.wire, ctx.rows, ctx.pairs, ctx.layer = wire, rows, pairs, layer
        weights_Q = wire.exchange(weights_P, pairs, name="dispatch weights", layer=layer)
        rows_RD = wire.exchange(rows_SD, rows, name="dispatch rows", layer=layer, payload=True)
        return rows_RD, weights_Q

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad_rows_RD, grad_weights_Q = grads
        wire, layer, rows, pairs = ctx.wire, ctx.layer, ctx.rows.reversed(), ctx.pairs.reversed()
        grad_weights_P = wire.exchange(grad_weights_Q, pairs, name="dispatch weights backward", layer=layer)
        grad_rows_SD = wire.exchange(grad_rows_RD, rows, name="dispatch rows backward", layer=layer, payload=True)
        return grad_rows_SD, grad_weights_P, None, None, None, None


def exchange_rows(
    rows_SD: Tensor, weights_P: Tensor, wire: AllToAll, rows: Splits, pairs: Splits, *, layer: str = ""
) -> tuple[Tensor, Tensor]:
    """Differentiable exchange of rows [S, D] and pair weights [P]: returns [R, D] and [Q].

    Two collectives forward and two backward, in one autograd node, so that every rank issues them in the same order.
    """
    return _ExchangeRows.apply(rows_SD, weights_P, wire, rows, pairs, layer)  # pyright: ignore[reportReturnType]


def split_sizes(counts: Sequence[int], own: int) -> tuple[int, ...]:
    """`counts` with the own rank's entry set to 0."""
    return tuple(0 if rank == own else count for rank, count in enumerate(counts))
