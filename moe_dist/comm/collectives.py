"""Defines reductions over a process group, and statistics of the bytes that all collectives send (`CommStats`).

If the process group is None (a single rank), a reduction returns its argument. If a `tracker` is given, the watchdog sees
the `name` of a reduction while this rank is inside the reduction.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from moe_dist.comm.tracker import CollectiveTracker, track_collective

R = TypeVar("R")


@dataclass
class CommStats:
    """Counts the bytes that this rank sends, and the seconds that communication takes. All layers share one object.

    Attributes:
        payload_bytes: Number of bytes of hidden rows and of their gradients that left this rank.
        inter_node_bytes: Number of payload bytes that left the node; 0 if the dispatcher does not distinguish nodes.
        metadata_bytes: Number of bytes of counts, expert ids, routing weights and their gradients that left this rank.
        seconds: On CPU, time that the host spent in calls of collectives and in waits for collectives. On CUDA, time that
            the stream waited for collectives; `drain` adds this time. The time in which a collective overlaps with
            computation is not counted.
        events: None, or a list that records events in order. An event is the name of a collective (recorded at its call),
            "wait <name>" (at its wait), "sync <name>" (where the host waits for the device), or a name given to `mark`.
    """

    payload_bytes: int = 0
    inter_node_bytes: int = 0
    metadata_bytes: int = 0
    seconds: float = 0.0
    events: list[str] | None = None
    _pending: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list, repr=False)

    def count(self, name: str, num_bytes: int, *, payload: bool, between_nodes: bool = False) -> None:
        """Counts the `num_bytes` that this rank sends in the collective `name`."""
        if payload:
            self.payload_bytes += num_bytes
            self.inter_node_bytes += num_bytes * between_nodes
        else:
            self.metadata_bytes += num_bytes
        self.event(name)

    def event(self, name: str) -> None:
        if self.events is not None:
            self.events.append(name)

    def mark(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Adds the event `name` now, and the event "<name> backward" when the tensor's gradient has been computed.

        Returns the tensor. Tests use these events to prove that a computation overlaps an exchange.
        """
        if self.events is not None:
            self.event(name)
            if tensor.requires_grad:
                tensor.register_hook(lambda _: self.event(f"{name} backward"))
        return tensor

    def to_host(self, name: str, counts: torch.Tensor) -> list[int]:
        """Returns the integers `counts` [n] as a list. The host waits for the copy. Adds the event "sync <name>"."""
        self.event(f"sync {name}")
        return counts.tolist()  # host sync

    def start_to_host(self, counts: torch.Tensor) -> Callable[[], list[int]]:
        """Starts to copy the integers `counts` [n] to the host. Returns a function that returns them as a list. The
        returned function waits for the copy, unless the host has waited for device work that was queued after the copy."""
        if counts.device.type != "cuda":
            return counts.tolist
        host = torch.empty(counts.shape, dtype=counts.dtype, pin_memory=True)
        host.copy_(counts, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()

        def read() -> list[int]:
            copied.synchronize()
            return host.tolist()

        return read

    @contextmanager
    def timed_call(self, device: torch.device) -> Iterator[None]:
        """Adds the time of the enclosed call to `seconds`. Does nothing on CUDA, where the call only queues the
        collective."""
        begin = time.perf_counter()
        yield
        if device.type != "cuda":
            self.seconds += time.perf_counter() - begin

    @contextmanager
    def timed(self, device: torch.device) -> Iterator[None]:
        """Adds the time of the enclosed wait to `seconds`. On CUDA, records events from which `drain` computes it."""
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()  # the event is queued on the stream, without a sync
            yield
            end.record()
            self._pending.append((start, end))
        else:
            begin = time.perf_counter()
            yield
            self.seconds += time.perf_counter() - begin

    def drain(self) -> None:
        """Adds the stream's waiting times on CUDA to `seconds`. Causes a host sync, so call it only at the end of a
        step."""
        for start, end in self._pending:
            end.synchronize()  # host sync
            self.seconds += start.elapsed_time(end) / 1e3
        self._pending.clear()

    def take(self) -> tuple[int, int, float]:
        """Returns payload bytes, metadata bytes and seconds since the last call of `take`, and resets all counters to 0."""
        self.drain()  # host sync on CUDA
        taken = (self.payload_bytes, self.metadata_bytes, self.seconds)
        self.payload_bytes, self.metadata_bytes, self.seconds = 0, 0, 0.0
        self.inter_node_bytes = 0
        return taken


def from_host(values: Sequence[float] | np.ndarray, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copies numbers from the host to a tensor [n] on the device. On CUDA the host only queues the copy."""
    return queue_copy(torch.tensor(values, dtype=dtype), device)


def queue_copy(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor from the host to the device. On CUDA the copy is only queued, so the host does not wait."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def pack(record: Any, device: torch.device | None = None) -> Tensor:
    """Concatenates the leaves of a record, in order, to one float64 vector, which a single all-reduce can sum.

    A record is a leaf, or a tuple, NamedTuple or mapping of records. A leaf is a tensor on the device, a number or array on
    the host, or None, which adds no element. Leaves on the host need `device`, and cost one queued copy.
    """
    leaves = list(_leaves(record))
    host = [np.ravel(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
    assert device is not None or not host, "numbers of the host need a device"
    copied = from_host(np.concatenate(host), torch.float64, device) if host and device is not None else None
    parts = [] if copied is None else list(copied.split([len(each) for each in host]))
    return torch.cat([leaf.flatten().to(torch.float64) if isinstance(leaf, Tensor) else parts.pop(0) for leaf in leaves])


def unpack(flat: Any, like: Any) -> Any:
    """Undoes `pack`. Cuts the vector `flat` (a tensor or numpy array) into a record with the names and shapes of `like`."""
    leaves, first = [], 0
    for leaf in _leaves(like):
        shape = tuple(getattr(leaf, "shape", ()))
        leaves.append(flat[first : first + math.prod(shape)].reshape(shape))
        first += math.prod(shape)
    return _filled(like, iter(leaves))


def added(records: Sequence[R]) -> R:
    """Returns the sum of records with equal fields, field by field. Costs one kernel for each further record and dtype."""
    columns: list[Sequence[Tensor]] = []

    def first(parts: Sequence[Tensor]) -> Tensor:
        columns.append(parts)
        return parts[0]

    like = _merged(records, first)
    totals = iter(_totals(columns))
    return _filled(like, (next(totals) if isinstance(leaf, Tensor) else leaf for leaf in _leaves(like)))


def _totals(columns: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    totals = [parts[0] for parts in columns]
    for dtype in dict.fromkeys(each.dtype for each in totals):
        for n in range(1, max(len(parts) for parts in columns)):
            at = [i for i, parts in enumerate(columns) if parts[0].dtype == dtype and n < len(parts)]
            sums = torch._foreach_add([totals[i] for i in at], [columns[i][n] for i in at])  # pyright: ignore[reportPrivateImportUsage]
            for i, total in zip(at, sums, strict=True):
                totals[i] = total
    return totals


def joined(records: Sequence[R]) -> R:
    """Concatenates records with equal fields along the first axis, field by field. A field that is None adds nothing."""
    return _merged(records, lambda parts: torch.cat(list(parts)))


def _merged(records: Sequence[Any], merge: Callable[[Sequence[Tensor]], Tensor]) -> Any:
    known = [record for record in records if record is not None]
    if known and isinstance(known[0], tuple):
        return _like(known[0], (_merged(parts, merge) for parts in zip(*known, strict=True)))
    return None if not known else merge(known) if isinstance(known[0], Tensor) else sum(known)


# Not nested in `unpack`, because a recursive nested function would keep tensors alive until a garbage collection.
def _filled(part: Any, leaves: Iterator[Any]) -> Any:
    """Returns a record with the structure of `part` and the leaves `leaves`."""
    if isinstance(part, Mapping):
        return {key: _filled(each, leaves) for key, each in part.items()}
    if isinstance(part, tuple):
        return _like(part, (_filled(each, leaves) for each in part))
    return None if part is None else next(leaves)


def _leaves(record: Any) -> Iterator[Any]:
    if isinstance(record, Mapping | tuple):
        for each in record.values() if isinstance(record, Mapping) else record:
            yield from _leaves(each)
    elif record is not None:
        yield record


def _like(part: Any, fields: Iterable[Any]) -> Any:
    """Returns a tuple of the type of `part`."""
    return type(part)(*fields) if hasattr(part, "_fields") else tuple(fields)


def sum_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "sum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Sums `tensor` over the ranks of `group`, in place. The result is bit-identical on every rank."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group)
    return tensor


def start_sum(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str, tracker: CollectiveTracker | None = None
) -> Callable[[], Tensor]:
    """Starts `sum_over`, and returns a function that waits for the sum and returns it. The result is bit-identical to
    `sum_over`. Kernels queued between start and wait run in parallel with the sum. The tracker records both."""
    if group is None:
        return lambda: tensor
    with track_collective(tracker, name, device=tensor.device):
        work = dist.all_reduce(tensor, op=dist.ReduceOp.SUM, group=group, async_op=True)
    assert work is not None

    def wait() -> Tensor:
        with track_collective(tracker, name, device=tensor.device):
            work.wait()  # on CUDA the stream waits, not the host
        return tensor

    return wait


def max_over(
    tensor: Tensor, group: dist.ProcessGroup | None, *, name: str = "maximum", tracker: CollectiveTracker | None = None
) -> Tensor:
    """Takes the maximum of `tensor` over the ranks of `group`, in place."""
    if group is not None:
        with track_collective(tracker, name, device=tensor.device):
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
    return tensor


def sum_gradients(
    parameters: list[torch.nn.Parameter],
    group: dist.ProcessGroup | None,
    *,
    flat: bool,
    name: str = "gradients",
    tracker: CollectiveTracker | None = None,
) -> None:
    """Sums the gradients of `parameters` over `group`, in place. If `flat` is True (for many small gradients), one
    all-reduce sums a concatenated copy. If False (for few large gradients), each gradient is summed without a copy."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if len(gradients) != len(parameters):  # otherwise the ranks would sum different tensors
        raise AssertionError("a parameter has no gradient; an expert without rows must get zeros")
    if not flat:
        for gradient in gradients:
            sum_over(gradient, group, name=name, tracker=tracker)
    elif group is not None and gradients:
        summed = sum_over(torch.cat([gradient.reshape(-1) for gradient in gradients]), group, name=name, tracker=tracker)
        parts = summed.split([each.numel() for each in gradients])
        copies = [part.view_as(gradient) for part, gradient in zip(parts, gradients, strict=True)]
        torch._foreach_copy_(gradients, copies)  # pyright: ignore[reportPrivateImportUsage]
