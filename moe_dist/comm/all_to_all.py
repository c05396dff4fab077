"""Implements an asynchronous all-to-all with uneven splits over one process group, and reusable buffers for its rows."""

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
    """Numbers of items that this rank sends to and receives from each rank of the process group. For hidden rows, the entry
    of this rank itself is 0 (`split_sizes`); for metadata, it may be above 0."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(send=self.receive, receive=self.send)


@dataclass(eq=False)
class Pending:
    """An all-to-all in flight. Until `wait` returns, `received` is undefined, and the sent items must not change.

    Attributes:
        layer, name: Name of the layer, and name of the exchange, for statistics and for reports of a hang.
        received: Buffer for the received items, [sum(receive), ...].
    """

    wire: "AllToAll" = field(repr=False)
    layer: str
    name: str
    splits: Splits
    received: Tensor = field(repr=False)
    _work: dist.Work | None = None
    _items: Tensor | None = None  # keeps the sent tensor in memory until the collective has read it
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
        """Waits for the exchange, and returns the received items, [sum(receive), ...]. With NCCL the CUDA stream waits;
        with gloo the host waits. May be called only once."""
        if self._waited:
            raise AssertionError(f"{self.name} of {self.layer or 'a layer'} has been waited for already")
        if self._work is not None:
            self.wire.comm_stats.event(f"wait {self.name}")
            with self.wire.comm_stats.timed(self.received.device), self._tracked():
                self._work.wait()
        self._waited, self._items = True, None
        return self.received

    def _tracked(self) -> AbstractContextManager[None]:
        """Shows the watchdog that this rank is inside the collective. Both `issue` and `wait` use this context, because the
        first collective of a process group may wait for other ranks already during `issue`. Between `issue` and `wait` the
        watchdog sees the rank outside the collective."""
        return track_collective(
            self.wire.tracker,
            self.name,
            device=self.received.device,
            layer=self.layer,
            send=self.splits.send,
            receive=self.splits.receive,
        )


class AllToAll:
    """Exchanges items over one process group. If `group` is None, there is only one rank, and an exchange moves nothing.
    With `between_nodes`, all payload bytes are also counted as inter-node bytes."""

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
        """Starts to send one slice of `items` [sum(send), ...] to each rank, in rank order, and returns without waiting.

        All ranks of the group must start their exchanges in the same order. A rank without items to send starts the
        exchange, too, because other ranks may send items.

        Args:
            payload: True if the items are hidden states or their gradients, False if they are metadata.
            out: Contiguous tensor [sum(receive), ...] for the received items; None allocates one.
        """
        received = items.new_empty((sum(splits.receive), *items.shape[1:])) if out is None else out
        pending = Pending(self, layer, name, splits, received)
        if self.group is not None:
            remote = sum(splits.send) - splits.send[self.rank]  # this rank's own slice stays on this rank
            row_bytes = items.element_size() * items[:1].numel() if items.shape[0] else 0
            self.comm_stats.count(name, remote * row_bytes, payload=payload, between_nodes=self.between_nodes)
            pending.issue(items.contiguous())  # copies only if the items are not contiguous
        return pending

    def exchange(self, items: Tensor, splits: Splits, *, name: str, layer: str = "") -> Tensor:
        """Exchanges items, such as counts or ids. Waits for the received items, and returns them, [sum(receive), ...]."""
        return self.start(items, splits, name=name, layer=layer).wait()


class RowBuffers:
    """A pool of buffers for hidden rows. An exchange takes a buffer and returns it, so that the next layer can reuse it.

    A buffer grows to the largest requested size. Use the pool only for rows that backward does not read: rows to be sent,
    and received rows that are only added to a sum. The pool saves time on CPU, where the page faults of a new allocation
    (one per 4 KiB) take longer than copying the rows. If `keep` is False, a buffer that is given back is freed."""

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
        self._free: list[Tensor] = []

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """Returns uninitialised rows [num_rows, D]. Width D, dtype and device are taken from `like` [..., D]."""
        width = like.shape[-1]
        num_bytes = num_rows * width * like.element_size()
        same_device = (index for index, storage in enumerate(self._free) if storage.device == like.device)
        index = next(same_device, None)
        storage = None if index is None else self._free.pop(index)
        if storage is None or storage.shape[0] < num_bytes:
            storage = torch.empty(num_bytes, dtype=torch.uint8, device=like.device)
        return storage[:num_bytes].view(like.dtype).view(num_rows, width)  # a buffer of bytes serves any dtype

    def give(self, rows: Tensor) -> None:
        """Puts the buffer of these rows back into the pool. The next user of the buffer overwrites the rows."""
        if self._keep:
            storage = rows.untyped_storage()  # the whole buffer; the rows may be only a part of it
            self._free.append(torch.empty(0, dtype=torch.uint8, device=rows.device).set_(storage, 0, (storage.nbytes(),)))  # pyright: ignore


def split_sizes(counts: Sequence[int], own: int) -> tuple[int, ...]:
    """Returns `counts` with the entry of this rank (`own`) set to 0."""
    return tuple(0 if rank == own else count for rank, count in enumerate(counts))
