"""Binds a rank to the CPUs that are nearest to its GPU. Imports no torch."""

import os
from collections.abc import Mapping, MutableMapping

from moe_dist.runtime.environment import THREADS

_ALL_CPUS = range(4096)
_WORD = 64  # NVML returns a set of CPUs as numbers of 64 bits


def bind_near_gpu(
    local_rank: int, local_world_size: int, variables: MutableMapping[str, str], *, lower_threads: bool
) -> None:
    """Binds this process to the CPUs that, according to NVML, are nearest to the rank's GPU. Copies between host and GPU
    then stay on one CPU socket. Call this function before torch is imported, because only threads that start later inherit
    the binding.

    Changes nothing if NVML or a GPU is missing, the kernel refuses, or the process is bound already. Also changes nothing
    if the process's cgroup lacks one of the near CPUs, because the remaining CPUs could be too few.

    Args:
        variables: The environment. CUDA_VISIBLE_DEVICES tells which GPUs the rank sees.
        lower_threads: If True and the process is bound, OMP_NUM_THREADS (a whole number) is lowered to the rank's part of
            the near CPUs. Pass False if a user or a launcher chose the number of threads.
    """
    near_R = _near_cpus(local_world_size, variables)
    near = near_R[min(local_rank, len(near_R) - 1)] if near_R else None
    if not near:
        return
    try:
        bound = os.sched_getaffinity(0)
        os.sched_setaffinity(0, _ALL_CPUS)  # the kernel ignores CPUs that the cgroup lacks
        allowed = os.sched_getaffinity(0)
        free = bound == allowed and near <= allowed
        os.sched_setaffinity(0, near if free else bound)
    except OSError:  # a sandbox may forbid the call; training also works without binding
        return
    if free and lower_threads:
        share = max(1, len(near) // sum(bool(near & other) for other in near_R))
        variables[THREADS] = str(min(int(variables[THREADS]), share))


def _near_cpus(local_world_size: int, variables: Mapping[str, str]) -> list[set[int]]:
    """Returns, for each rank of the node, the CPUs near the GPU that `parallel.mesh.own_gpu` will return. Returns one set
    if this rank sees only its own GPU, and no set if NVML fails. NVML numbers GPUs by their position on the bus, which is
    also CUDA's order if all cards of the node are equal."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        try:
            visible = variables.get("CUDA_VISIBLE_DEVICES")
            shown = range(pynvml.nvmlDeviceGetCount()) if visible is None else visible.split(",")
            found = []
            for name in (str(each).strip() for each in shown[:local_world_size]):
                number = name.isdecimal()
                handle = pynvml.nvmlDeviceGetHandleByIndex(int(name)) if number else pynvml.nvmlDeviceGetHandleByUUID(name)
                words = pynvml.nvmlDeviceGetCpuAffinity(handle, len(_ALL_CPUS) // _WORD)
                found.append({_WORD * i + bit for i, word in enumerate(words) for bit in range(_WORD) if word >> bit & 1})
            return found
        finally:
            pynvml.nvmlShutdown()
    except (pynvml.NVMLError, OSError):  # no driver, or no such GPU; training also works without binding
        return []
