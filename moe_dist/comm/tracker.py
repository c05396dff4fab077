"""Which collectives this rank is in: written where they are called, read by the watchdog's thread. Imports no torch."""

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
        entered: How many collectives the rank had entered by then, this one included. Every rank issues the same ones in
            the same order, so a rank with a smaller number is behind.
        collective: Its name.
        layer: Name of the layer that called it; empty where no layer did.
        send, receive: Items for and from each rank of the group; empty where all ranks bring the same.
        since: When it was entered, by time.monotonic.
    """

    entered: int
    collective: str
    layer: str
    send: tuple[int, ...]
    receive: tuple[int, ...]
    since: float


class CollectiveTracker:
    """The collectives of one rank. Costs two dictionary operations each, and on CUDA one event; no sync.

    Attributes:
        entered: Collectives entered so far.
        waited: Seconds that the host has spent inside them so far. On CUDA it only starts them: hardly any.
    """

    def __init__(self) -> None:
        self._count = itertools.count(1)
        self._unfinished: dict[int, tuple[Position, Callable[[], bool] | None]] = {}
        self._lock = threading.Lock()
        self._among: str | None = None
        self._moved = 0.0
        self.entered = 0
        self.waited = 0.0

    @contextmanager
    def among(self, collectives: str) -> Iterator[None]:
        """Encloses work that calls collectives which are not noted, such as FSDP2's. A rank that has neither entered nor
        left a noted collective for too long is then reported to be in one of those."""
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
        """Around the call of a collective, or around the wait for an asynchronous one.

        On CUDA the call returns before the collective has run: it counts as unfinished until the stream has passed it.
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
                    self._unfinished[entered] = (position, _passed(device))
                else:
                    del self._unfinished[entered]
                self._moved = time.monotonic()
                self.waited += self._moved - position.since

    def oldest(self) -> Position | None:
        """The first collective that has not finished; None where the rank is in none, nor inside `among`."""
        with self._lock:
            for entered, (_, finished) in list(self._unfinished.items()):
                if finished is not None and finished():
                    del self._unfinished[entered]
                    self._moved = time.monotonic()
            for position, _ in self._unfinished.values():
                return position
            return None if self._among is None else Position(self.entered, self._among, "", (), (), self._moved)


def track_collective(
    tracker: CollectiveTracker | None,
    collective: str,
    *,
    device: "torch.device",
    layer: str = "",
    send: Sequence[int] = (),
    receive: Sequence[int] = (),
) -> AbstractContextManager[None]:
    """`tracker.inside(...)`; without a tracker nothing is noted."""
    if tracker is None:
        return nullcontext()
    return tracker.inside(collective, device=device, layer=layer, send=send, receive=receive)


def _passed(device: "torch.device") -> Callable[[], bool]:
    """Whether the current stream of a CUDA device has got as far as it is filled now. Asking does not wait."""
    import torch

    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event.query
