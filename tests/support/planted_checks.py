"""Checks for `moe-dist gpu-check` with planted faults. Each runs in its own process."""

import faulthandler
import os
import signal
import time
from typing import Any

from tools.gpu_check import training
from tools.gpu_check.kernels import kernels
from tools.gpu_check.outcome import CheckJob, NotPossibleError, Reading
from tools.gpu_check.process import on_ranks


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


def wrong_for_three_pairs(job: CheckJob) -> list[Reading]:
    """A fault at a size that the trial at a run's start does not cover."""
    from moe_dist.moe.kernels.triton_kernels import TRITON

    triton: Any = TRITON
    swiglu = triton.swiglu
    triton.swiglu = lambda weight, *args: swiglu(weight, *args) * (1.1 if len(weight) == 3 else 1.0)
    return kernels(job)


def forgotten_checkpoint(job: CheckJob) -> list[Reading]:
    module: Any = training
    module._resumed = _forgets
    return training.repeat(job)


def _forgets(job: CheckJob, mesh: Any, folder: str) -> dict[str, int]:
    """Runs on a rank with unchanged training, and resumes from new weights instead of the checkpoint's."""
    run: Any = training.RandomRun
    run.load = lambda *_: None
    return training._resumed(job, mesh, folder)


def missed_bar(job: CheckJob) -> list[Reading]:
    return [Reading("difference", float("nan"), most=1e-3), Reading("rate", job.rate("copy"), least=6.0)]


def crash(job: CheckJob) -> list[Reading]:
    os.kill(os.getpid(), signal.SIGSEGV)
    return []


def hang(job: CheckJob) -> list[Reading]:
    time.sleep(600)
    return []


def hanging_rank(job: CheckJob) -> list[Reading]:
    on_ranks(_sleeps, job, world=1)
    return []


def _sleeps(job: CheckJob, mesh: Any) -> None:
    faulthandler.dump_traceback_later(0.5, exit=True, file=2)  # instead of waiting for the time limit
    time.sleep(600)


def lacking(job: CheckJob) -> list[Reading]:
    raise NotPossibleError("no such card")
