"""Checks for `moe-dist gpu-check` with planted faults. Each check runs in its own process."""

import os
import signal
import time
from typing import Any

from tools.gpu_check.kernels import kernels
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading


def good(job: CheckJob) -> list[Reading]:
    """Writes a line for each run."""
    with (job.folder / "runs").open("a") as stream:
        stream.write("run\n")
    return [Reading("copy", 5.0, "B/s", least=1.0), job.timed("slow", 0.0, least=1.0)]


def wrong_kernel(job: CheckJob) -> list[Reading]:
    from moe_dist.moe.kernels.triton_kernels import TRITON

    triton: Any = TRITON
    swiglu = triton.swiglu
    triton.swiglu = lambda *args: swiglu(*args) * 1.1
    return kernels(job)


def missed_bar(job: CheckJob) -> list[Reading]:
    return [Reading("difference", float("nan"), most=1e-3), Reading("rate", job.rate("copy"), least=6.0)]


def crash(job: CheckJob) -> list[Reading]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hang(job: CheckJob) -> list[Reading]:
    time.sleep(600)
    return []


def lacking(job: CheckJob) -> list[Reading]:
    raise NotPossibleError("no such card")
