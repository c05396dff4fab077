"""Counts with torch's profiler the kernels that a function launches, and computes the share of time without a kernel."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from tools.gpu_check.outcome import CheckJob


class Profiled(NamedTuple):
    """Number of launched kernels, and fraction of the time from the first to the last kernel in which no kernel runs."""

    launches: int
    idle: float


def profiled(job: CheckJob, run: Callable[[], Any], trace: Path | None = None) -> Profiled:
    """Profiles one call of `run`. With `rehearse`, counts CPU operations. Writes a trace in Chrome's format to `trace`."""
    activities = [ProfilerActivity.CPU, *([] if job.rehearse else [ProfilerActivity.CUDA])]
    with profile(activities=activities) as found:
        run()
        if not job.rehearse:
            torch.cuda.synchronize()
    if trace is not None:
        found.export_chrome_trace(str(trace))
    kind = "CPU" if job.rehearse else "CUDA"
    events: list[Any] = list(found.events() or [])
    return idle_share([(each.time_range.start, each.time_range.end) for each in events if each.device_type.name == kind])


def idle_share(spans: list[tuple[float, float]]) -> Profiled:
    """Computes `Profiled` from the (start, end) times of each kernel; kernels may overlap."""
    busy, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        busy += max(0.0, last - max(first, end))
        end = max(end, last)
    whole = end - min((first for first, _ in spans), default=end)
    return Profiled(len(spans), 1.0 - busy / whole if spans and whole > 0.0 else 0.0)
