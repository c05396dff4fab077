"""Measures the speed of a preset, the rate and overlap of exchanges, and the host syncs of layers and steps. The preset
gets as many layers as fit into the memory."""

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from moe_dist.comm.all_to_all import AllToAll, Splits
from moe_dist.comm.collectives import CommStats
from moe_dist.moe.kernels.torch_kernels import TORCH
from moe_dist.monitor.card_peaks import peak_tflops
from moe_dist.parallel.mesh import Mesh
from moe_dist.placement.placement import group_shares
from moe_dist.plan.flops import expected_experts, model_flops_per_token
from moe_dist.train.start.dry_run import estimate
from research.gpu_bench.cards import WIDTH, allocated
from research.gpu_bench.ceilings import BF16, drawn, seconds_of
from research.gpu_bench.graph import static_layer
from research.gpu_bench.profiled import profiled
from tools.gpu_check.layers import make_layer, passes, single_group, triton_or_none
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks
from tools.gpu_check.training import MODES, SMALL, RandomRun, configure

TIMES = 20  # number of exchanges; all ranks must run the same number
KINDS = {
    "plain": "parallel.dispatch={kind: all_to_all}",
    "overlap": "parallel.dispatch={kind: all_to_all, overlap: true}",
    "halves": "parallel.two_batch_overlap=true",
}


def preset(job: CheckJob) -> list[Reading]:
    """Trains OLMoE on full sequences of random tokens, with as many layers as fit into memory according to a dry run."""
    name, sequences, layers, timed = (SMALL, 2, 1, 1) if job.rehearse else ("olmoe_1b7b_8gpu", 32, 16, 5)
    found = on_ranks(_timed_preset, job, name, sequences, layers, timed)[0]
    tokens, seconds = found["tokens"], found["seconds"]
    rate = tokens * found["flops"] / seconds / job.gpus
    readings = [
        Reading("layers", found["layers"]),
        job.timed("tokens/s on all GPUs", tokens / seconds),
        job.timed("model FLOPs of a GPU", rate / 1e12, "TFLOP/s"),
    ]
    if (peak := peak_tflops(job.card)) is not None:
        readings.append(job.timed("MFU", rate / 1e12 / peak, least=0.4))
    # The folder of logs has the trace of the profiled step.
    readings.append(job.timed("share of a step in which the GPU waits", found["idle"], most=0.05))
    if "gemm" in job.rates:
        readings.append(job.timed("seconds over those of the FLOPs at the dense rate", job.rates["gemm"] / rate))
    if not job.rehearse:
        readings.append(Reading("memory: growth from step 3 to the last", found["growth"] / 2**20, "MiB", most=1.0))
        readings.append(Reading("memory: reserved / allocated at the peak", found["reserved"], most=1.1))
        readings.append(Reading("memory: peak / dry run", found["peak"] / found["estimate"], most=1.1))
    return readings


def _timed_preset(job: CheckJob, mesh: Mesh, name: str, sequences: int, most: int, timed: int) -> dict[str, float]:
    on_gpu = mesh.device.type == "cuda"
    budget = 0.85 * torch.cuda.get_device_properties(mesh.device).total_memory if on_gpu else math.inf
    needed = math.inf
    for layers in range(most, 0, -1):
        config = configure(job, mesh, [f"model.num_layers={layers}"], name=name, sequences=sequences)
        needed = estimate(config).rank_memory.total
        if needed < budget:
            break
    else:
        raise NotPossibleError(f"{name} with one layer needs {needed / 2**30:.0f} GiB on each rank")
    run = RandomRun(mesh, config)
    run.take(1 if job.rehearse else 2)
    held = allocated(mesh)
    began = time.perf_counter()
    results = run.take(timed)  # each step ends with a read from the device
    seconds = (time.perf_counter() - began) / timed
    idle = profiled(job, lambda: run.take(1), job.folder / "trace.json" if mesh.rank == 0 else None).idle
    groups = run.layout.groups
    share = dict(zip((group.name for group in groups), group_shares(groups, {}), strict=True))
    return {
        "layers": layers,
        "tokens": results[-1].tokens,
        "seconds": seconds,
        "flops": model_flops_per_token(expected_experts(groups), share, config=config),
        "estimate": needed,
        "idle": idle,
        "growth": allocated(mesh) - held,
        "peak": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved": torch.cuda.max_memory_reserved() / torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def exchanges(job: CheckJob) -> list[Reading]:
    """Measures the bytes per second that a rank sends in small exchanges and in large exchanges. Also measures how long a
    training step waits for exchanges, and which fraction of this time each kind of overlap hides."""
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


def syncs(job: CheckJob) -> list[Reading]:
    """Counts how often the host waits for the device, as reported by torch's warnings. Counts the waits in a training step,
    and in forward and backward of a layer, with and without exchanges of fixed sizes. Counts nothing with `rehearse`,
    because the host waits only for CUDA devices."""
    tokens, hidden, ffn = (16, 16, 8) if job.rehearse else (1024, 512, 768)
    device, groups = torch.device(job.device), single_group(8, 4, 3, ffn)
    # With `rehearse` no kernels are used, because Triton's interpreter is slow and other checks try the kernels.
    kernels = None if job.rehearse else triton_or_none(device, torch.bfloat16)
    known = make_layer(hidden, groups, kernels=kernels or TORCH).to(device)
    x_TD = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    group_T, readings = torch.zeros(tokens, dtype=torch.int64, device=device), []
    fixed = static_layer(known, hidden, groups, tokens).to(device)
    for name, made, most in (("sizes read", known, 1), ("fixed sizes", fixed, 0)):
        if not job.rehearse:  # compiles kernels
            passes(made, x_TD, group_T, x_TD)
        with counted_waits(device) as waits:
            passes(made, x_TD, group_T, x_TD)
        readings.append(Reading(f"syncs of a layer, {name}", len(waits), most=most))
    (found, most) = on_ranks(_step_waits, job, world=1)[0]
    return [*readings, Reading("syncs of a step with two micro-batches", found, most=most)]


def _step_waits(job: CheckJob, mesh: Mesh) -> tuple[int, int]:
    """Returns how often the host waits in a step, and the limit: one per MoE layer and micro-batch, and two at the end."""
    config = configure(job, mesh, MODES["FSDP2, bf16"], sequences=2)
    run, batches = RandomRun(mesh, config), config.train.global_batch // config.train.micro_batch
    run.take(2)
    with counted_waits(mesh.device) as waits:
        run.take(1)
    print("\n".join(waits))
    return len(waits), batches * len(config.model.moe_layers) + 2


@contextmanager
def counted_waits(device: torch.device) -> Iterator[list[str]]:
    """Collects the warnings of torch about waits of the host inside the block. Without a GPU there are none."""
    waits: list[str] = []
    on_gpu = device.type == "cuda"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if on_gpu:
            torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            if on_gpu:
                torch.cuda.set_sync_debug_mode("default")
    # Only warnings with this text count: torch also warns that the debug mode is a prototype.
    waits += [str(each.message) for each in caught if "called a synchronizing" in str(each.message)]
