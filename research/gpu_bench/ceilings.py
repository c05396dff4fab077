"""Measures the GPU's rates.

Shape letters: T tokens, D hidden size, F hidden width of experts, E experts, K choices of a token.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.benchmark import Timer

from tools.gpu_check.outcome import CheckJob, Reading

BF16 = 2  # bytes
TIMED_SECONDS = 0.5  # seconds for which each measurement is repeated
SHAPE = {"T": 8192, "D": 2048, "F": 1024, "E": 64, "K": 8}  # OLMoE-1B-7B, two sequences
TINY = {"T": 16, "D": 16, "F": 8, "E": 4, "K": 2}
H100 = {"copy": 2.7e12, "gemm": 700e12}  # limits: about 0.8 and 0.7 of the data sheet's 3.35e12 B/s and 989e12 FLOP/s


def seconds_of(job: CheckJob, run: Callable[[], Any], *, times: int = 0) -> float:
    """Returns the median seconds of a call of `run`. On CUDA torch's timer queues many calls between two syncs, so that
    launches overlap with kernels. With `rehearse`, times one call. If `run` has collectives, `times` must be set: all
    ranks then call it `times` times, and the result is the mean."""
    timer = Timer("run()", globals={"run": run})
    if job.rehearse:
        return timer.timeit(1).median
    run()  # compiles before the timer's first call, whose time sets the number of queued calls
    return timer.timeit(times).mean if times else timer.blocked_autorange(min_run_time=TIMED_SECONDS).median


def sizes(job: CheckJob) -> tuple[int, ...]:
    """Returns T, D, F, E and K of OLMoE. With `rehearse`, returns tiny numbers."""
    return tuple((TINY if job.rehearse else SHAPE).values())


def drawn(job: CheckJob, *shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Draws normal values on the job's device."""
    return torch.randn(*shape, device=job.device, dtype=dtype)


def ceilings(job: CheckJob) -> list[Reading]:
    """Measures the rates with which other checks compare: bytes/s of a copy (read and written), and bf16 FLOP/s."""
    count, width = (1 << 10, 32) if job.rehearse else (1 << 29, 8192)
    source = drawn(job, count)
    target, x = torch.empty_like(source), drawn(job, width, width)
    bars = H100 if "H100 80GB HBM3" in job.card else {}  # no limits for H100 PCIe and NVL
    copy = 2 * BF16 * count / seconds_of(job, lambda: target.copy_(source))
    gemm = 2 * width**3 / seconds_of(job, lambda: x @ x)
    small = torch.zeros(1, device=job.device)
    launch = seconds_of(job, lambda: [small.add_(1) for _ in range(100)]) / 100
    readings = [
        job.timed("copy", copy, "B/s", least=bars.get("copy", 0.0)),
        job.timed("gemm", gemm, "FLOP/s", least=bars.get("gemm", 0.0)),
        job.timed("a launch", launch * 1e6, "us"),
    ]
    if not job.rehearse:
        host = torch.empty(1 << 28, dtype=torch.uint8, pin_memory=True)
        up = host.to("cuda")
        rate = host.numel() / seconds_of(job, lambda: up.copy_(host, non_blocking=True))
        readings.append(job.timed("copy from the host", rate, "B/s"))
    return readings
