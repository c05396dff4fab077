"""Uneven all-to-all over one process group: counted, and in flight until it is waited for; and buffers for its rows."""

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
    """How many items go to, and come from, each rank of the group. The own rank's entries are 0: they stay on this rank."""

    send: tuple[int, ...]
    receive: tuple[int, ...]

    def reversed(self) -> "Splits":
        return Splits(send=self.receive, receive=self.send)


@dataclass(eq=False)
class Pending:
    """An all-to-all that was issued. Until it has been waited for, its items must not change and its result is undefined.

    Attributes:
        layer, name: The layer that issued it, and the name of its content.
        splits: Its sizes.
        received: The buffer that receives.
        comm_stats, tracker: Where it is counted and noted.
    """

    layer: str
    name: str
    splits: Splits
    received: Tensor = field(repr=False)
    comm_stats: CommStats = field(repr=False)
    tracker: CollectiveTracker | None = field(default=None, repr=False)
    _work: dist.Work | None = None
    _items: Tensor | None = None  # the collective reads it until it has ended
    _waited: bool = False

    def issue(self, items: Tensor, group: dist.ProcessGroup) -> None:
        """Starts the collective. `AllToAll` calls it once."""
        self._items = items
        with self.comm_stats.timed_call(items.device), self._tracked():
            self._work = dist.all_to_all_single(
                self.received, items, list(self.splits.receive), list(self.splits.send), group=group, async_op=True
            )

    def wait(self) -> Tensor:
        """The items received, [sum(receive), ...]. Blocks the stream, not the host (on gloo the host). Call it once."""
        if self._waited:
            raise AssertionError(f"{self.name} of {self.layer or 'a layer'} has been waited for already")
        if self._work is not None:
            self.comm_stats.event(f"wait {self.name}")
            with self.comm_stats.timed(self.received.device), self._tracked():
                self._work.wait()
        self._waited, self._items = True, None
        return self.received

    def _tracked(self) -> AbstractContextManager[None]:
        """Notes the collective for the watchdog, around the call (a first call may wait for its peers) and around the wait.
        Between the two the rank itself is in no collective."""
        return track_collective(
            self.tracker,
            self.name,
            device=self.received.device,
            layer=self.layer,
            send=self.splits.send,
            receive=self.splits.receive,
        )


class AllToAll:
    """All-to-all over one process group. Without a group it is the identity on a single rank: the same calls, no bytes.

    Args:
        tracker: Notes its collectives for the watchdog.
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
        self, items: Tensor, splits: Splits, *, name: str, layer: str = "", payload: bool = False, out: Tensor | None = None
    ) -> Pending:
        """Issues the exchange of consecutive slices of `items` [sum(send), ...] to the ranks in order, and returns at once.

        Counted here, at the call. All ranks of the group must call it in the same order, with whatever sizes, zero
        included: nothing is skipped on empty splits, since a peer may have something to send.

        Args:
            name, layer: Name of the content and of the layer, for records and for the report of a hang.
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
        """`start` and `wait`: the items received, [sum(receive), ...]."""
        return self.start(items, splits, name=name, layer=layer, payload=payload).wait()


class RowBuffers:
    """Buffers of rows that live for one exchange: taken before it, given back after it, used again by the next layer.

    A free list of flat storages, as many as were ever in use at once; each grows to the largest size asked for. Take only
    rows that no backward reads: rows to be sent, and rows that arrive to be added to others. A fresh allocation of this
    size costs the host one page fault for each 4 KiB, more than the copy into it; on CUDA the caching allocator would do.

    Args:
        keep: Without it a storage is freed when it is given back.
    """

    def __init__(self, *, keep: bool = True) -> None:
        self._keep = keep
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
        if not self._keep:
            return
        storage = rows.untyped_storage()
        self._free.append(torch.empty(0, dtype=torch.uint8, device=rows.device).set_(storage, 0, (storage.nbytes(),)))  # pyright: ignore

    def clear(self) -> None:
        """Forgets the storages that are free now."""
        self._free.clear()

    @property
    def num_bytes(self) -> int:
        """Bytes of the storages that are free now."""
        return sum(storage.untyped_storage().nbytes() for storage in self._free)


def split_sizes(counts: Sequence[int], own: int) -> tuple[int, ...]:
    """`counts` with the own rank's entry set to 0."""
    return tuple(0 if rank == own else count for rank, count in enumerate(counts))
