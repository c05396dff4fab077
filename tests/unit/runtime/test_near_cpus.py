"""A rank is bound to the CPUs that are nearest to its GPU. The tests use a fake NVML, and a fake kernel or the real
kernel."""

import os
import sys
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pynvml
import pytest

from moe_dist.runtime.near_cpus import bind_near_gpu

NEAR = [{0, 1, 2}, {70, 71, 72}]  # nearest CPUs of each GPU
UUIDS = {"GPU-a": 0, "GPU-b": 1}


class Kernel:
    """Stands in for the kernel's CPU binding of this process."""

    def __init__(self, cgroup: Iterable[int], bound: Iterable[int] | None = None) -> None:
        self.cgroup = set(cgroup)
        self.bound = set(cgroup if bound is None else bound)

    def bind(self, _process: int, cpus: Iterable[int]) -> None:
        assert set(cpus) & self.cgroup, "the kernel refuses an empty set"
        self.bound = set(cpus) & self.cgroup


def raises(error: Exception) -> Any:
    raise error


def nvml(near: list[set[int]] = NEAR) -> Any:
    missing = pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
    return SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(near),
        nvmlDeviceGetHandleByIndex=lambda index: near[index] if index < len(near) else raises(missing),
        nvmlDeviceGetHandleByUUID=lambda uuid: near[UUIDS[uuid]] if uuid in UUIDS else raises(missing),
        nvmlDeviceGetCpuAffinity=lambda cpus, words: [
            sum(1 << cpu % 64 for cpu in cpus if cpu // 64 == word) for word in range(words)
        ],
    )


def bound_by(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, rank: int, *, lower: bool = False, **variables: str
) -> tuple[set[int], dict[str, str]]:
    monkeypatch.setattr(os, "sched_setaffinity", kernel.bind)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(kernel.bound))
    bind_near_gpu(rank, 2, variables, lower_threads=lower)
    return kernel.bound, variables


@pytest.mark.parametrize(
    ("local_rank", "variables", "gpu"),
    [
        (0, {}, 0),
        (1, {}, 1),
        (0, {"CUDA_VISIBLE_DEVICES": "1,0"}, 1),
        (1, {"CUDA_VISIBLE_DEVICES": "GPU-b, GPU-a"}, 0),
        (1, {"CUDA_VISIBLE_DEVICES": "0"}, 0),  # each rank sees only its own GPU
    ],
)
def test_the_cpus_of_the_ranks_gpu(
    monkeypatch: pytest.MonkeyPatch, local_rank: int, variables: dict[str, str], gpu: int
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert bound_by(Kernel(range(100)), monkeypatch, local_rank, lower=False, **variables)[0] == NEAR[gpu]


class Refusing(Kernel):
    def bind(self, _process: int, cpus: Iterable[int]) -> None:
        raise PermissionError


@pytest.mark.parametrize(
    ("module", "kernel", "variables"),
    [
        (nvml(), Kernel(range(100), bound=range(50)), {}),  # srun or taskset has bound the process
        (nvml(), Kernel(range(1, 100)), {}),  # the cgroup lacks CPU 0
        (nvml(), Kernel(range(50, 60)), {}),
        (nvml(), Kernel(range(100)), {"CUDA_VISIBLE_DEVICES": "7"}),  # this GPU does not exist
        (nvml(), Refusing(range(100)), {}),  # a container that may not bind processes
        (None, Kernel(range(8)), {}),
    ],
)
def test_the_binding_stays(monkeypatch: pytest.MonkeyPatch, module: Any, kernel: Kernel, variables: dict[str, str]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    before, given = set(kernel.bound), {**variables, "OMP_NUM_THREADS": "50"}
    assert bound_by(kernel, monkeypatch, 0, lower=True, **given) == (before, given)


@pytest.mark.parametrize(("threads", "lower", "left"), [("50", True, "3"), ("2", True, "2"), ("50", False, "50")])
def test_no_more_threads_than_cpus(monkeypatch: pytest.MonkeyPatch, threads: str, lower: bool, left: str) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    found = bound_by(Kernel(range(100)), monkeypatch, 0, lower=lower, OMP_NUM_THREADS=threads)
    assert found == (NEAR[0], {"OMP_NUM_THREADS": left})


def test_ranks_near_the_same_cpus_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml([{0, 1, 2, 3}, {0, 1, 2, 3}, {0, 1, 2, 3}]))  # three GPUs, two ranks
    found = bound_by(Kernel(range(8)), monkeypatch, 1, lower=True, OMP_NUM_THREADS="4")
    assert found == ({0, 1, 2, 3}, {"OMP_NUM_THREADS": "2"})
