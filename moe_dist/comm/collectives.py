"""Reductions over a process group, and the count of the bytes that every collective sends.

Without a group (one rank) a reduction returns its argument. With a `tracker` the watchdog sees it, under its `name`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.tracker import CollectiveTracker, track_collective


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


def sum_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "sum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Sum of `tensor` over the ranks of `group`, in place; the same bits on every rank."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def max_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "maximum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Maximum of `tensor` over the ranks of `group`, in place."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def sum_gradients(
    parameters: list[torch.nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    name: str = "gradients",
    tracker: CollectiveTracker | None = None,
) -> None:
    """Sums the gradients of `parameters` over `group`, in place, one all-reduce each: for few large tensors."""
    for gradient in _gradients(parameters):
        sum_over(gradient, group, name=name, tracker=tracker)


def sum_small_gradients(
    parameters: list[torch.nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    name: str = "gradients",
    tracker: CollectiveTracker | None = None,
) -> None:
    """The same in one all-reduce of a concatenated copy: for many small tensors."""
    gradients = _gradients(parameters)
    if group is None or not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    flat = sum_over(flat, group, name=name, tracker=tracker)
    for gradient, summed in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))


def _gradients(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
    """All gradients; a missing one would make ranks disagree about what is summed, so it is an error."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) != len(parameters):
        raise AssertionError("a parameter has no gradient; an expert without rows must get zeros")
    return gradients
