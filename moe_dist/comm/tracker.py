"""Tracks the collectives that this rank has entered but not left, for the watchdog's thread. Imports no torch."""

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Position:
    """One collective that this rank has entered.

    Attributes:
        entered: Number of collectives that this rank has entered, including this one. All ranks issue the same collectives
            in the same order, so the rank with the smallest number is behind.
        layer: Name of the layer that called the collective; empty outside the layers.
        send, receive: Numbers of items sent to and received from each rank of the group; empty if all ranks send equally
            many.
        since: Time of entry, by time.monotonic.
    """

    entered: int
    collective: str
    layer: str
    send: tuple[int, ...]
    receive: tuple[int, ...]
    since: float


class CollectiveTracker:
    """Records the collectives that one rank enters and leaves. A collective costs two dictionary operations. On CUDA it
    also costs one CUDA event and a query of the oldest event, but no sync.

    Attributes:
        entered: Number of collectives entered so far.
        waited: Seconds that the host has spent inside collectives; nearly 0 on CUDA, where calls only queue.
    """

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._unfinished: dict[int, tuple[Position, Callable[[], bool] | None]] = {}
        self._lock = threading.Lock()  # the training, checkpoint and watchdog threads share the tracker
        self._among: str | None = None
        self._moved = 0.0  # last time at which a collective was entered or left
        self.entered = 0
        self.waited = 0.0

    @contextmanager
    def among(self, collectives: str) -> Iterator[None]:
        """Encloses code that calls untracked collectives, such as FSDP2's. If the rank neither enters nor leaves a
        tracked collective for too long in this code, the watchdog reports that the rank is inside one of `collectives`."""
        with self._lock:
            self._among, self._moved = collectives, time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._among = None

    @contextmanager
    def inside(
        self,
        collective: str,
        *,
        device: "torch.device",
        layer: str = "",
        send: Sequence[int] = (),
        receive: Sequence[int] = (),
    ) -> Iterator[None]:
        """Encloses the call of a collective, or the wait for an asynchronous collective.

        On CUDA the call returns before the GPU has run the collective. The tracker therefore records a CUDA event after the
        collective, and counts the collective as unfinished until this event has occurred.
        """
        entered = self.entered = next(self._count)
        position = Position(entered, collective, layer, tuple(send), tuple(receive), time.monotonic())
        with self._lock:
            self._unfinished[entered] = (position, None)
        try:
            yield
        finally:
            with self._lock:
                if device.type == "cuda":
                    self._remove_finished(all=False)  # called here, because a run on one GPU has no watchdog
                    self._unfinished[entered] = (position, _passed(device))
                else:
                    del self._unfinished[entered]
                self._moved = time.monotonic()
                self.waited += self._moved - position.since

    def oldest(self) -> Position | None:
        """Returns the unfinished collective that was entered first. If all collectives are finished, returns a position for
        the enclosing `among` block, or None without such a block."""
        with self._lock:
            self._remove_finished(all=True)
            for position, _ in self._unfinished.values():
                return position
            return None if self._among is None else Position(self.entered, self._among, "", (), (), self._moved)

    def _remove_finished(self, *, all: bool) -> None:
        """Removes the entries of collectives that the CUDA stream has finished. If `all` is False, stops at the first
        collective that is not finished."""
        for entered, (_, finished) in list(self._unfinished.items()):  # a copy, because the loop deletes entries
            if finished is not None and finished():
                del self._unfinished[entered]
                self._moved = time.monotonic()
            elif not all:
                return


class BusyClock:
    """Measures the busy time of a rank in a step: the step's duration minus the waits for other ranks.

    On a CPU the clock subtracts the host's time in collectives. On CUDA the host does not wait in collectives. There the
    clock subtracts the device's time in exchanges, which `CommStats.seconds` contains only after `CommStats.drain`.
    """

    def __init__(self, tracker: CollectiveTracker | None, began: float) -> None:
        self._watch, self._began = tracker, began
        self._waited = tracker.waited if tracker is not None else 0.0

    def seconds(self, in_exchanges: float) -> float:
        waited = self._watch.waited - self._waited if self._watch is not None else 0.0
        return max(0.0, time.perf_counter() - self._began - max(waited, in_exchanges))


def track_collective(
    tracker: CollectiveTracker | None,
    collective: str,
    *,
    device: "torch.device",
    layer: str = "",
    send: Sequence[int] = (),
    receive: Sequence[int] = (),
) -> AbstractContextManager[None]:
    """Calls `tracker.inside` with the same arguments; does nothing if `tracker` is None."""
    if tracker is None:
        return nullcontext()
    return tracker.inside(collective, device=device, layer=layer, send=send, receive=receive)


def _passed(device: "torch.device") -> Callable[[], bool]:
    """Returns a function that says, without waiting, whether the CUDA stream has finished all work that is queued now."""
    import torch  # imported here, because login nodes without torch import this file

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))

    def passed() -> bool:
        # The current device of the watchdog's thread is GPU 0 at first. Without `set_device`, the query would open a CUDA
        # context there, which costs 0.5 GB of GPU 0's memory for each rank of the node.
        torch.cuda.set_device(device)
        return event.query()

    return passed
