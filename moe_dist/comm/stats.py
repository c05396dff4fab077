"""The count of what crosses the wire, taken at the call of each collective."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch


@dataclass
class CommStats:
    """A running count, owned by whoever reads it; one for all layers of a model.

    Attributes:
        payload_bytes: Bytes of hidden rows (and of their gradients) that left this rank.
        inter_node_bytes: Of the payload, what went between nodes, where the dispatcher knows nodes.
        metadata_bytes: Bytes of counts, expert ids, weights and weight gradients that left this rank.
        seconds: Time that the host spent in calling and waiting for collectives or, on CUDA, that the stream waited for
            them (known only after `drain`): what computation hides is not in it.
        events: Where a list is given, in order: a collective's name at its call, "wait <name>" where it is waited for,
            "sync <name>" where the host waits for the device, and what `mark` names.
    """

    payload_bytes: int = 0
    inter_node_bytes: int = 0
    metadata_bytes: int = 0
    seconds: float = 0.0
    events: list[str] | None = None
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    def count(self, name: str, num_bytes: int, *, payload: bool, between_nodes: bool = False) -> None:
        """Adds one collective that sends `num_bytes` from this rank."""
        if payload:
            self.payload_bytes += num_bytes
            self.inter_node_bytes += num_bytes * between_nodes
        else:
            self.metadata_bytes += num_bytes
        self.event(name)

    def event(self, name: str) -> None:
        """Records an event, where events are recorded."""
        if self.events is not None:
            self.events.append(name)

    def mark(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Records `name` now, and "<name> backward" when the tensor's gradient has been computed; returns the tensor.

        Costs nothing where no events are recorded: it proves what was computed while which exchange was in flight.
        """
        if self.events is not None:
            self.event(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.event(f"{name} backward"))
        return tensor

    def to_host(self, name: str, counts: torch.Tensor) -> list[int]:
        """The named host sync: integers [n] as a list. The host waits for all that the device was given before."""
        self.event(f"sync {name}")
        return counts.tolist()

    @contextmanager
    def timed_call(self, device: torch.device) -> Iterator[None]:
        """Times the enclosed call of a collective; on CUDA, where the stream does not wait for it, nothing is counted."""
        begin = time.perf_counter()
        yield
        if device.type != "cuda":
            self.seconds += time.perf_counter() - begin

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Times the enclosed wait; on CUDA by events, so that the host does not wait here."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._pending.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begin

    def drain(self) -> None:
        """Adds the time of finished CUDA collectives. Syncs with the device; call it once a step, after the step."""
        for start, end in self._pending:
            end.synchronize()
            self.seconds += start.elapsed_time(end) / 1e3
        self._pending.clear()

    def take(self) -> tuple[int, int, float]:
        """Payload bytes, metadata bytes and seconds since the last call, and starts again from zero."""
        self.drain()
        taken = (self.payload_bytes, self.metadata_bytes, self.seconds)
        self.payload_bytes, self.metadata_bytes, self.seconds = 0, 0, 0.0
        self.inter_node_bytes = 0
        return taken
