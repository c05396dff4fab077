"""Checks several ranks on one machine: the rate of exchanges, the fraction of the exchange time that computation hides, and
that no rank opens a CUDA context on another rank's GPU."""

import threading
from typing import Any

import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.parallel.mesh import Mesh
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.rates import BF16, drawn, seconds_of
from tools.gpu_check.training import RandomRun, configure

WIDTH = 2048
TIMES = 20  # number of exchanges, equal on all ranks
KINDS = {
    "plain": "parallel.dispatch={kind: all_to_all}",
    "overlap": "parallel.dispatch={kind: all_to_all, overlap: true}",
    "halves": "parallel.two_batch_overlap=true",
}


def exchanges(job: CheckJob) -> list[Reading]:
    """Measures the bytes per second that a rank sends in small and large exchanges, the time that a training step waits for
    exchanges, and the fraction of this time that each kind of overlap hides."""
    if not job.rehearse and job.gpus < 2:
        raise NotPossibleError("an exchange needs two GPUs")
    found = on_ranks(_sent, job)
    waited = on_ranks(_waited, job)[0]
    readings = [
        job.timed(f"{name} to each rank: all-to-all", min(each[name] for each in found) / 1e9, "GB/s") for name in found[0]
    ]
    for kind, seconds in waited.items():
        readings.append(job.timed(f"{kind}: wait for exchanges in a step", seconds * 1e3, "ms"))
        if kind != "plain":
            readings.append(job.timed(f"{kind}: share that it hides", 1.0 - seconds / waited["plain"]))
    return readings


def _sent(job: CheckJob, mesh: Mesh) -> dict[str, float]:
    wire, found = AllToAll(mesh.ep, CommStats()), {}
    for rows in (4, 8) if job.rehearse else (64, 1024, 8192):
        counts = tuple(0 if rank == mesh.rank else rows for rank in range(mesh.world_size))
        items = drawn(job, sum(counts), WIDTH)

        def send(items: torch.Tensor = items, splits: Splits = Splits(counts, counts)) -> Any:
            return wire.start(items, splits, name="rows").wait()

        seconds = seconds_of(job, send, times=TIMES)
        found[f"{rows * WIDTH * BF16 / 1e6:g} MB"] = sum(counts) * WIDTH * BF16 / seconds
    return found


def _waited(job: CheckJob, mesh: Mesh) -> dict[str, float]:
    found = {}
    for kind, override in KINDS.items():
        overrides = ("parallel.data=ddp", "parallel.precision=bf16", "train.micro_batch=2", override)
        run = RandomRun(mesh, configure(job, mesh, overrides, sequences=4))
        run.take(1 if job.rehearse else 2)
        found[kind] = sum(each.comm_seconds for each in run.take(1 if job.rehearse else 5))
    return found


def contexts(job: CheckJob) -> list[Reading]:
    """Counts the processes with a CUDA context on GPU 0, after each rank has used its own GPU and queried the oldest
    collective in a thread, as the watchdog does."""
    if job.rehearse or job.gpus < 2:
        raise NotPossibleError("contexts of other ranks need two GPUs")
    before, (after, *_) = _processes(), on_ranks(_counted, job)
    return [Reading("more processes on GPU 0", after - before, most=1)]


def _counted(job: CheckJob, mesh: Mesh) -> int:
    wire = AllToAll(mesh.ep, CommStats(), mesh.tracker)
    counts = tuple(0 if rank == mesh.rank else 8 for rank in range(mesh.world_size))
    wire.exchange(drawn(job, sum(counts), WIDTH), Splits(counts, counts), name="rows")
    thread = threading.Thread(target=mesh.tracker.oldest)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    torch.distributed.barrier(mesh.world)
    count = _processes()
    torch.distributed.barrier(mesh.world)  # no rank ends before all ranks have counted
    return count


def _processes() -> int:
    """Returns NVML's number of processes with a context on the first GPU that torch sees."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid: Any = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return len(pynvml.nvmlDeviceGetComputeRunningProcesses(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
    finally:
        pynvml.nvmlShutdown()
