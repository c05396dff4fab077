"""Takes training steps and watches every operation of torch, to find operations that touch rows while an exchange is
sending or receiving these rows.

On CUDA, torch's stream sanitizer watches the operations, too. The sanitizer knows the streams that Python uses, but not
NCCL's streams, in which exchanges run.
"""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dist.comm.all_to_all import Pending
from moe_dist.parallel.mesh import Mesh
from tools.gpu_check.outcome import CheckJob, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.training import MOST, RandomRun, configure, losses_and_norms

PLAIN = "plain"
KINDS = {
    PLAIN: "parallel.dispatch={kind: all_to_all}",
    "overlap": "parallel.dispatch={kind: all_to_all, overlap: true}",
    "overlap and chunks": "parallel.dispatch={kind: all_to_all, overlap: true, chunks: 2}",
    "halves": "parallel.two_batch_overlap=true",
    "static": "parallel.dispatch={kind: static, room: 8.0}",
}
STEPS = 2


def extent(tensor: Tensor) -> tuple[int, int]:
    """Returns the address of the tensor's first byte, and the address after its last byte."""
    elements = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.element_size() * bool(tensor.numel())


class InFlight(TorchDispatchMode):
    """Raises AssertionError if an operation reads or writes rows that are being received, or writes rows that are being
    sent. `exchanges` counts the exchanges that were started."""

    def __init__(self) -> None:
        super().__init__()
        self.exchanges = 0
        self._sent: dict[Pending, tuple[int, int]] = {}
        self._arriving: dict[Pending, tuple[int, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (self._sent or self._arriving) and not func.is_view and func.namespace != "c10d":
            given = [*args, *(kwargs or {}).values()]
            written = [_written(func, place, args, kwargs or {}) for place in range(len(func._schema.arguments))]
            self._refuse(func, tree_leaves(given), self._arriving, "touches rows that arrive")
            self._refuse(func, tree_leaves(written), self._sent, "writes rows that are being sent")
        return func(*args, **(kwargs or {}))

    def _refuse(self, func: Any, values: list[Any], flying: dict[Pending, tuple[int, int]], what: str) -> None:
        for tensor in values:
            if not isinstance(tensor, Tensor) or not tensor.numel():
                continue
            begin, end = extent(tensor)
            for pending, (first, last) in flying.items():
                if begin < last and first < end:
                    here = [each for each in traceback.format_stack() if "moe_dist" in each][-1:]
                    raise AssertionError(f"{func} {what}: {pending.name} of {pending.layer or 'a layer'}; {' '.join(here)}")

    @contextmanager
    def watching(self) -> Iterator["InFlight"]:
        """Enters this dispatch mode, and follows all exchanges."""
        issue, wait = Pending.issue, Pending.wait

        def issued(pending: Pending, items: Tensor) -> None:
            issue(pending, items)
            self.exchanges += 1
            self._sent[pending], self._arriving[pending] = extent(items), extent(pending.received)

        def waited(pending: Pending) -> Tensor:
            received = wait(pending)
            self._sent.pop(pending, None)
            self._arriving.pop(pending, None)
            return received

        with ExitStack() as stack:
            stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes belong to one thread
            stack.enter_context(mock.patch.object(Pending, "issue", issued))
            stack.enter_context(mock.patch.object(Pending, "wait", waited))
            stack.enter_context(self)
            yield self


def _written(func: Any, place: int, args: Any, kwargs: Any) -> Any:
    """Returns the argument at index `place` of the schema if the operation writes it, else None."""
    argument = func._schema.arguments[place]
    if argument.alias_info is None or not argument.alias_info.is_write:
        return None
    return args[place] if place < len(args) else kwargs.get(argument.name)


def races(job: CheckJob) -> list[Reading]:
    """Counts the watched exchanges of each kind of overlap. Measures the largest relative difference between the losses
    and gradient norms with overlap and those with the plain exchange. If an operation touches rows that are being
    exchanged, the check fails and names the operation and the source line."""
    found = on_ranks(_watched, job, world=max(2, job.gpus))[0]
    exact, readings = torch.tensor(found[PLAIN]["values"]), []
    for kind, each in found.items():
        apart = float((torch.tensor(each["values"]) / exact - 1).abs().max())
        readings.append(Reading(f"{kind}: exchanges watched", each["exchanges"], least=1))
        readings.append(Reading(f"{kind}: difference of losses and gradient norms", apart, most=MOST["bf16"]))
    return readings


def _watched(job: CheckJob, mesh: Mesh) -> dict[str, Any]:
    found = {}
    with ExitStack() as stack:
        if mesh.device.type == "cuda":
            from torch.cuda._sanitizer import CUDASanitizerDispatchMode

            stack.enter_context(CUDASanitizerDispatchMode())
        for kind, override in KINDS.items():
            overrides = ("parallel.data=ddp", "parallel.precision=bf16", "train.micro_batch=2", override)
            run = RandomRun(mesh, configure(job, mesh, overrides, sequences=4))
            with InFlight().watching() as mode:
                values = losses_and_norms(run.take(STEPS))
            found[kind] = {"exchanges": mode.exchanges, "values": values}
    return found
