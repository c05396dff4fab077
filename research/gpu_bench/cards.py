"""Checks what GPUs and a long run hold: NVML's readings, CUDA contexts, and memory after 100 steps."""

import threading
import time
from typing import Any

import psutil
import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.monitor.devices import MIB, DeviceMonitor
from moe_dist.parallel.mesh import Mesh
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.training import MODES, RandomRun, configure, losses_and_norms

POWER_SECONDS = 2.0
WIDTH = 2048


def power(job: CheckJob) -> list[Reading]:
    """Reads the state of a GPU that multiplies matrices, and compares NVML's used memory with CUDA's."""
    if job.rehearse:
        raise NotPossibleError("there is no GPU to read")
    monitor = DeviceMonitor(seconds=0.1, gpu=str(torch.cuda.get_device_properties(0).uuid))
    try:
        x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        watts, loads, end = [], [], time.monotonic() + POWER_SECONDS
        while time.monotonic() < end:
            for _ in range(20):
                torch.matmul(x, x)
            torch.cuda.synchronize()
            latest = monitor.latest
            watts.append(latest["device/power"])
            loads.append(latest["device/utilisation"])
        free, total = torch.cuda.mem_get_info()
        read = monitor.latest["gpu_used_mib"]
    finally:
        monitor.stop()
    if read is None:
        raise NotPossibleError("NVML gives no readings here; the log of the check has its reason")
    known = [each for each in watts if each is not None]
    off = abs(read * MIB - (total - free)) / total
    readings = [Reading("used memory by NVML and by CUDA: difference / all memory", off, most=0.05)]
    if known:
        readings.append(Reading("power of matrix products", max(known), "W", least=1.0))
    return [*readings, Reading("utilisation", max(each or 0.0 for each in loads), "%")]


def contexts(job: CheckJob) -> list[Reading]:
    """Counts the processes with a CUDA context on GPU 0. Before the count, each rank uses its own GPU and, like the
    watchdog, queries the oldest collective in a thread."""
    if job.rehearse or job.gpus < 2:
        raise NotPossibleError("contexts of other ranks need two GPUs")
    before, (after, *_) = _processes(), on_ranks(_counted, job)
    return [Reading("more processes on GPU 0", after - before, most=1)]


def _counted(job: CheckJob, mesh: Mesh) -> int:
    wire = AllToAll(mesh.ep, CommStats(), mesh.tracker)
    counts = tuple(0 if rank == mesh.rank else 8 for rank in range(mesh.world_size))
    wire.exchange(torch.randn(sum(counts), WIDTH, device=job.device), Splits(counts, counts), name="rows")
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


def long_run(job: CheckJob) -> list[Reading]:
    """Trains the small preset in bf16 for 100 steps, each on the same tokens. The loss must fall. After step 20, the
    memory of device and host must hardly grow."""
    found = on_ranks(_long, job)
    losses = found[0]["losses"]
    return [
        Reading("loss of the last step / of the first", losses[1] / losses[0], most=0.95),
        Reading("growth of the GPU's memory", max(each["allocated"] for each in found), "MiB", most=1.0),
        Reading("growth of the host's memory", max(each["resident"] for each in found), "MiB", most=64.0),
        Reading("unfinished collectives", max(each["unfinished"] for each in found), most=8),
    ]


def _long(job: CheckJob, mesh: Mesh) -> dict[str, Any]:
    settled, last = (3, 8) if job.rehearse else (20, 100)
    run, results, held = RandomRun(mesh, configure(job, mesh, MODES["FSDP2, bf16"])), [], []
    for number in range(last):
        run.step = 0  # the same tokens in each step
        results += run.take(1)
        if number + 1 in (settled, last):
            held.append((allocated(mesh), psutil.Process().memory_info().rss))
    (before, host_before), (after, host_after) = held
    return {
        "losses": losses_and_norms([results[0], results[-1]])[::2],
        "allocated": (after - before) / 2**20,
        "resident": (host_after - host_before) / 2**20,
        "unfinished": len(mesh.tracker._unfinished),
    }


def allocated(mesh: Mesh) -> int:
    """Returns the bytes of the tensors on this rank's GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated(mesh.device) if mesh.device.type == "cuda" else 0
