"""Asynchronous all-to-all with uneven splits over one process group, and reusable buffers for its rows."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.collectives import CommStats
from moe_dist.comm.tracker import CollectiveTracker, track_collective


@dataclass(frozen=True)
class Splits:
    """Numbers of items to and from each rank of the group. The own rank has 0, because its own items are not sent."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(send=self.receive, receive=self.send)


@dataclass(eq=False)
class Pending:
    """An all-to-all in flight. Until `wait` returns, the sent items must not change and `received` is undefined.

    Attributes:
        wire: The `AllToAll` that issued the exchange.
        layer, name: The layer that asked for the exchange, and the exchanged content; for records and reports of a hang.
        received: Buffer for the items that arrive, [sum(receive), ...].
    """

    wire: "AllToAll" = field(repr=False)
    layer: str
    name: str
    splits: Splits
    received: Tensor = field(repr=False)
    _work: dist.Work | None = None
    _items: Tensor | None = None  # keeps the memory alive that the collective still reads
    _waited: bool = False

    def issue(self, items: Tensor) -> None:
        """Starts the collective. `AllToAll` calls this method once."""
        self._items = items
        with self.wire.comm_stats.timed_call(items.device), self._tracked():
            self._work = dist.all_to_all_single(
                self.received,
                items,
                list(self.splits.receive),
                list(self.splits.send),
                group=self.wire.group,
                async_op=True,
            )

    def wait(self) -> Tensor:
        """Waits and returns the received items, [sum(receive), ...]. On NCCL the stream waits, on gloo the host. Call it
        once."""
        if self._waited:
            raise AssertionError(f"{self.name} of {self.layer or 'a layer'} has been waited for already")
        if self._work is not None:
            self.wire.comm_stats.event(f"wait {self.name}")
            with self.wire.comm_stats.timed(self.received.device), self._tracked():
                self._work.wait()
        self._waited, self._items = True, None
        return self.received

    def _tracked(self) -> AbstractContextManager[None]:
        """Shows the watchdog that this rank is inside the collective: during the call, because the first call may wait for
        its peers, and during the wait. Between call and wait the rank computes."""
        where = {"layer": self.layer, "send": self.splits.send, "receive": self.splits.receive}
        return track_collective(self.wire.tracker, self.name, device=self.received.device, **where)


class AllToAll:
    """All-to-all over one process group. Without a group there is one rank, and each exchange moves nothing.

    Args:
        tracker: Tracks each exchange for the watchdog.
        between_nodes: True if the group's ranks are on different nodes, so that the payload also counts as inter-node
            bytes.
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
        self, items: Tensor, splits: Splits, *, name: str, layer: str = "", payload: bool = False, out: Tensor | None = None
    ) -> Pending:
        """Sends consecutive slices of `items` [sum(send), ...] to the ranks in order, and returns at once.

        All ranks of the group must start their exchanges in the same order. An exchange without items is issued too,
        because a peer may have something to send.

        Args:
            layer, name: See `Pending`.
            payload: True if the items are hidden rows, not metadata.
            out: Contiguous tensor [sum(receive), ...] that receives; a new one if None.
        """
        received = items.new_empty((sum(splits.receive), *items.shape[1:])) if out is None else out
        pending = Pending(self, layer, name, splits, received)
        if self.group is not None:
            remote = sum(splits.send) - splits.send[self.rank]  # the own slice is copied locally
            row_bytes = items.element_size() * items[:1].numel() if items.shape[0] else 0
            self.comm_stats.count(name, remote * row_bytes, payload=payload, between_nodes=self.between_nodes)
            pending.issue(items.contiguous())  # copies only strided items
        return pending

    def exchange(self, items: Tensor, splits: Splits, *, name: str, layer: str = "") -> Tensor:
        """Exchanges metadata, waits, and returns the received items [sum(receive), ...]."""
        return self.start(items, splits, name=name, layer=layer).wait()


class RowBuffers:
    """A free list of buffers for rows. An exchange takes a buffer and gives it back; the next layer uses it again.

    A buffer grows to the largest size that was asked for. Use buffers only for rows that backward does not read: rows to
    send, and received rows that are added to others. A fresh allocation would cost the host one page fault per 4 KiB,
    which is more than the copy into it.

    Args:
        keep: If false, a buffer is freed when it is given back.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._free: list[Tensor] = []

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """Uninitialised rows [num_rows, D] with the width, dtype and device of `like` [*, D]."""
        width = like.shape[-1]
        num_bytes = num_rows * width * like.element_size()
        same_device = (index for index, storage in enumerate(self._free) if storage.device == like.device)
        index = next(same_device, None)
        storage = None if index is None else self._free.pop(index)
        if storage is None or storage.shape[0] < num_bytes:
            storage = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        return storage[:num_bytes].view(like.dtype).view(num_rows, width)  # raw bytes, so that every dtype fits

    def give(self, rows: Tensor) -> None:
        """Takes rows back; their values may change from now on."""
        if self._keep:
            storage = rows.untyped_storage()  # takes the whole storage, also beyond the rows
            self._free.append(torch.empty(0, dtype=torch.uint8, device=rows.device).set_(storage, 0, (storage.nbytes(),)))  # pyright: ignore


def split_sizes(counts: Sequence[int], own: int) -> tuple[int, ...]:
    """`counts` with the own rank's entry set to 0."""
    return tuple(0 if rank == own else count for rank, count in enumerate(counts))
