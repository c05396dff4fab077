"""Binds a rank to the CPUs that are nearest to its GPU. Imports no torch."""

import os
from collections.abc import Mapping, MutableMapping

from moe_dist.runtime.environment import THREADS

_ALL_CPUS = range(4096)
_WORD = 64  # CPUs in one number of NVML's answer


def bind_near_gpu(local_rank: int, variables: MutableMapping[str, str]) -> None:
    """Binds this process to the CPUs that NVML names as nearest to the rank's GPU, so that copies between host and GPU do
    not cross the node's sockets. Lowers OMP_NUM_THREADS to their number. Call it before torch is imported, because only
    threads that start later inherit the binding.

    Changes nothing without NVML or a GPU, if someone has bound the process already, or if the cgroup of the process lacks
    one of the CPUs: the others could be too few.
    """
    near, bound = _near_cpus(local_rank, variables), os.sched_getaffinity(0)
    if not near:
        return
    os.sched_setaffinity(0, _ALL_CPUS)  # the kernel leaves out CPUs that the cgroup lacks
    allowed = os.sched_getaffinity(0)
    if bound != allowed or not near <= allowed:
        os.sched_setaffinity(0, bound)
        return
    os.sched_setaffinity(0, near)
    if variables.get(THREADS, "").isdecimal():
        variables[THREADS] = str(min(int(variables[THREADS]), len(near)))


def _near_cpus(local_rank: int, variables: Mapping[str, str]) -> set[int]:
    """Returns the CPUs near the GPU that `parallel.mesh.own_gpu` will take; empty if NVML does not tell. NVML counts GPUs
    by their place on the bus, as CUDA does among equal cards."""
    try:
        import pynvml

        pynvml.nvmlInit()
        try:
            visible = variables.get("CUDA_VISIBLE_DEVICES")
            shown = range(pynvml.nvmlDeviceGetCount()) if visible is None else visible.split(",")
            name = str(shown[0 if len(shown) == 1 else local_rank]).strip()
            number = name.isdecimal()
            handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if number else pynvml.nvmlDeviceGetHandleByUUID(name)
            words = pynvml.nvmlDeviceGetCpuAffinity(handle, len(_ALL_CPUS) // _WORD)
            return {_WORD * i + bit for i, word in enumerate(words) for bit in range(_WORD) if word >> bit & 1}
        finally:
            pynvml.nvmlShutdown()
    except Exception:  # no package, driver or such GPU: training needs no binding
        return set()
