"""Takes training steps of several layouts in turn on this machine. Stores the seconds, sent bytes, memory and expert
choices of the steps.

For each number of ranks, a set of processes stays alive, and waits on a pipe while another set computes. A round can
therefore visit (time) all layouts within minutes, and other load of the machine affects all layouts alike. Each visit is
one line of `visits.jsonl`. Visits in this file are not repeated. A step is timed as in `Trainer`, but without records and
sinks. The learning rate is 0, so that routing is equal in all rounds.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.config.bundled import find_config
from moe_dist.config.schema import Config
from moe_dist.errors import ResourceError
from moe_dist.plan.preflight import Preflight, check_file
from moe_dist.runtime.signals import child_of
from research.gpu_bench.token_imbalance import WorkloadShape, workload_step
from tools.calibrate import RANK_ENV

TIMEOUT = 900.0
FIRST, STEPS = 1, 7  # numbers of untimed steps and of timed steps in a visit


@dataclass(frozen=True)
class MeasuredLayout:
    """A configuration. The expert choices of `workload`, if it is given, replace the choices of the routers."""

    config: str
    overrides: tuple[str, ...]
    workload: str | None = None

    @property
    def name(self) -> str:
        short = [each.replace("parallel.", "").replace("model.moe.groups.", "") for each in self.overrides]
        return " ".join([*short, *([self.workload] if self.workload else [])])

    def checked(self) -> Preflight:
        return check_file(find_config(self.config), self.overrides)


def ranks_of(config: Config) -> int:
    return config.parallel.ep * config.parallel.edp


def measure(layouts: Sequence[MeasuredLayout], folder: Path, rounds: int) -> None:
    """Visits each layout `rounds` times. Raises ResourceError if a rank fails; standard error has the traceback of this
    rank."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "visits.jsonl"
    done = {(line["layout"], line["round"]) for line in visits(path)}
    todo = [(i, n) for n in range(rounds) for i in range(len(layouts)) if (i, n) not in done]
    if not todo:
        return
    os.environ.update(RANK_ENV)
    worlds = [ranks_of(each.checked().config) for each in layouts]
    with tempfile.TemporaryDirectory(prefix="moe_dist_layouts_") as store, path.open("a") as lines:
        groups = {world: _Ranks(world, layouts, folder, store) for world in {worlds[i] for i, _ in todo}}
        try:
            for layout, number in todo:
                visited = groups[worlds[layout]].visit(layout, number)
                print(json.dumps({"layout": layout, "round": number, **visited}), file=lines, flush=True)
        finally:
            for ranks in groups.values():
                ranks.close()


def visits(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the stored visits; nothing if there is no file."""
    yield from map(json.loads, path.read_text().splitlines()) if path.is_file() else ()


class _Ranks:
    """The processes that time all layouts with the same number of ranks."""

    def __init__(self, world: int, layouts: Sequence[MeasuredLayout], folder: Path, store: str) -> None:
        context = get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            pipe, theirs = context.Pipe()
            arguments = (rank, world, layouts, folder, f"file://{store}/{world}", theirs, os.getpid())
            self._processes.append(context.Process(target=_rank, args=arguments, daemon=True))
            self._pipes.append(pipe)
            self._processes[-1].start()
            theirs.close()

    def visit(self, layout: int, number: int) -> dict[str, Any]:
        for pipe in self._pipes:
            pipe.send((layout, number))
        try:
            found = [pipe.recv() for pipe in self._pipes]
        except EOFError:
            raise ResourceError(f"layout {layout}: a rank ended; read its error above") from None
        return {**asdict(found[0]), "cpu": [each.cpu for each in found], "memory": [each.memory for each in found]}

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # a rank ends when its pipe is closed
        for process in self._processes:
            process.join(30.0)
            process.kill()


@dataclass(frozen=True)
class Visit:
    """The measurements that one rank makes in one visit.

    Attributes:
        seconds, cpu: Wall time and CPU time of each timed step.
        sent: Payload bytes that all ranks sent in the traced step: in total, and between nodes. Empty after round 0.
        memory: Peak bytes of all tensors in the layout's second step. It is 0 after the layout's first visit.
    """

    seconds: list[float]
    cpu: list[float]
    sent: list[int]
    memory: float = 0.0


def _rank(
    rank: int, world: int, layouts: Sequence[MeasuredLayout], folder: Path, method: str, pipe: Any, parent: int
) -> None:
    child_of(parent, ignore_stop=False)()
    import torch

    from moe_dist.parallel.mesh import destroy_world, init_world
    from moe_dist.train.loop.garbage import collected_by_steps

    torch.set_num_threads(1)
    init_world(init_method=method, rank=rank, world_size=world, device=torch.device("cpu"), timeout=TIMEOUT)
    made: dict[int, _Job] = {}
    while True:
        try:
            layout, number = pipe.recv()
        except EOFError:
            break
        memory = 0.0
        if layout not in made:
            made[layout], memory = counted_memory(lambda layout=layout: _Job(layouts[layout], rank, world))
        with collected_by_steps():
            visit = made[layout].visit(number, folder / f"layout_{layout:02d}_rank_{rank}.npz")
        pipe.send(replace(visit, memory=memory))
    destroy_world()


def counted_memory(make: Callable[[], "_Job"]) -> tuple["_Job", float]:
    """Makes a job and takes two steps. Returns the job, and the peak bytes of all tensors in the second step. The bytes are
    computed from the allocator's record of allocations and frees since the beginning of `make`."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        job = make()
        job.take()  # the first step allocates the optimizer's state
        with record_function("counted step"):
            job.take()
    events = profiled.profiler.kineto_results.events()  # pyright: ignore[reportOptionalMemberAccess]
    (began,) = (each.start_ns() for each in events if each.name() == "counted step")
    freed_or_taken = [each for each in events if each.name() == "[memory]"]
    changes = sorted((each.start_ns(), each.nbytes()) for each in freed_or_taken)  # pyright: ignore[reportAttributeAccessIssue]
    held = np.cumsum([change for _, change in changes])
    return job, float(max(each for (at, _), each in zip(changes, held, strict=True) if at >= began))


class _Job:
    """One layout on one rank."""

    def __init__(self, layout: MeasuredLayout, rank: int, world: int) -> None:
        import torch

        from moe_dist.data.loader import ReadAhead
        from moe_dist.parallel.mesh import make_mesh
        from moe_dist.train.build import training as build

        plan = layout.checked()
        self.layout, self.plan, self.config = layout, plan, plan.config
        section = plan.config.parallel
        nodes, cpu = section.dispatch.node_size, torch.device("cpu")
        self.mesh = make_mesh(ep=section.ep, device=cpu, timeout=TIMEOUT, ranks_per_node=nodes)
        self.training = build.build_training(plan.config, plan.manifest, plan.placement, self.mesh)
        self.aux = build.loop_settings(plan.config, plan.manifest, plan.placement).aux(0)
        self.read = build.build_loader(plan.config, plan.manifest, rank=rank, world_size=world).batches
        self.reader = ReadAhead(self.read)
        self.share = {"micro_batch": plan.config.train.micro_batch, "rank": rank, "world_size": world}
        self.step = 0

    def visit(self, number: int, path: Path) -> Visit:
        sent = self._traced(path) if number == 0 else []
        for _ in range(FIRST):
            self.take()
        taken = [self.take() for _ in range(STEPS)]
        return Visit([wall for wall, _, _ in taken], [cpu for _, cpu, _ in taken], sent)

    def _traced(self, path: Path) -> list[int]:
        """Writes a step's expert choices into a file. Returns the step's payload bytes: in total, and between nodes."""
        seen = _Choices(self._sequences())
        _, _, result = self.take(seen)
        np.savez_compressed(path, **seen.arrays())  # pyright: ignore[reportArgumentType]
        return [result.ledger["payload_bytes"], result.ledger["inter_node_bytes"]]

    def _sequences(self) -> list[range]:
        from moe_dist.data.order import micro_batches

        batch = self.config.train.global_batch
        return micro_batches(self.step * batch, global_batch=batch, **self.share)

    def take(self, *watchers: Any) -> tuple[float, float, Any]:
        batch = self.config.train.global_batch
        position = self.step * batch
        with self._forced(position):
            began, cpu = time.perf_counter(), time.process_time()
            batches = self.reader.batches(position, following=position + batch)
            result = self.training.step(batches, lr=0.0, aux=self.aux, began=began, number=self.step, watchers=watchers)
            taken = time.perf_counter() - began, time.process_time() - cpu, result
        self.step += 1
        return taken

    def _forced(self, position: int) -> Any:
        """Returns a context in which the workload's expert choices replace the choices of the routers."""
        from contextlib import nullcontext

        from moe_dist.moe.replayed_routers import Replay

        if self.layout.workload is None:
            return nullcontext()
        self.reader.settle()
        batches = self.read(position)
        modality_T = np.concatenate([batch.modality_BS.flatten().numpy() for batch in batches])
        padding_T = np.concatenate([batch.padding_BS.flatten().numpy() for batch in batches])
        of_modality = self.training.step.group_of_modality.numpy()
        group_T = np.where(padding_T, -1, of_modality[modality_T])
        groups, layers = self.plan.placement.groups, len(self.config.model.moe_layers)
        ids_TLK = np.full((len(group_T), layers, max(group.top_k for group in groups)), -1, np.int16)
        for number, group in enumerate(groups):
            shape = WorkloadShape(len(group_T), group.num_experts, group.top_k, self.config.parallel.ep)
            for layer in range(layers):
                drawn = workload_step(self.layout.workload, seed=layer, step=self.step, shape=shape)
                mine_T = group_T == number
                ids_TLK[mine_T, layer, : group.top_k] = drawn.expert_TK[mine_T] + group.first_expert
        return Replay(self.training.parallel.model, ids_TLK, group_T, source=f"workload {self.layout.workload}")


class _Choices:
    """A `moe_dist.train.step.tracing.StepWatcher` that stores the expert choices of a step in memory."""

    def __init__(self, sequences: Sequence[range]) -> None:
        self._sequences, self._parts = sequences, []

    def due(self, number: int) -> bool:
        return True

    def add(self, batch: Any, reports: Sequence[Any]) -> None:
        import torch

        rows = (~batch.padding_BS).flatten().nonzero().flatten()
        ids_TLK = torch.stack([report.chosen.column_TK for report in reports], dim=1)[rows]
        numbers = self._sequences[len(self._parts)].start + rows // batch.tokens_BS.shape[1]
        self._parts.append([each.numpy() for each in (ids_TLK, numbers, batch.modality_BS.flatten()[rows])])

    def finish(self, number: int) -> None:
        pass

    def flush(self) -> None:
        pass

    def arrays(self) -> dict[str, np.ndarray]:
        names = ("ids_TLK", "sequence_T", "modality_T")
        return dict(zip(names, map(np.concatenate, zip(*self._parts, strict=True)), strict=True))
