"""Reads a process's rank, rendezvous and attempt from the environment variables that its launcher has set."""

import os
import re
import socket
import uuid
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from moe_dist.errors import ConfigError
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

PUBLISHED = "published"  # rank 0 writes its address into the run folder (runtime/rendezvous.py)
RAY_METRICS = "MOE_DIST_RAY_METRICS"  # under Ray, rank 0 sends its metrics to this socket (monitor/sinks/prometheus.py)
ALONE = "tcp://127.0.0.1:0"  # init method of a run with one process, on any free port
THREADS = "OMP_NUM_THREADS"
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_OTHER_NAMES = (  # srun is last, because mpirun may itself run inside srun tasks
    tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),  # Open MPI
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),  # MPICH, Intel MPI
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_GTIDS"),  # SLURM_GTIDS lists the ranks of the node
)


@dataclass(frozen=True)
class RankEnv:
    """Rank and rendezvous of one process.

    Attributes:
        rank, world_size: Global rank, and number of ranks on all nodes.
        local_rank, local_world_size: Rank on this node, and number of ranks on it. local_rank is also the index of the GPU.
        init_method: How the ranks meet: PUBLISHED, or torch's env://, tcp://HOST:PORT or file:///PATH.
        attempt: Number of restarts by the launcher; 0 for the first attempt. torchrun's agents may count differently.
        attempt_id: Unique name of this attempt. If the launcher does not set it, each process makes up a name, and all
            ranks use rank 0's name once they have met (parallel/meeting.py).
        launched: True if a launcher of moe_dist started the process and writes its standard error to the rank's log.
        grace_seconds: Seconds from a stop signal until the process ends itself.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str
    attempt: int
    attempt_id: str
    launched: bool = False
    grace_seconds: float = DEFAULT_GRACE_SECONDS

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "RankEnv":
        """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (or the names of mpirun or srun), MOE_DIST_INIT_METHOD (or
        MASTER_ADDR and MASTER_PORT), MOE_DIST_ATTEMPT (or TORCHELASTIC_RESTART_COUNT), MOE_DIST_ATTEMPT_ID and
        MOE_DIST_GRACE_SECONDS. If RANK is missing, the run has one process. If LOCAL_RANK is missing, each node has one
        process. Raises one ConfigError with all problems if other variables are missing, not numeric, or contradictory."""
        problems: list[str] = []
        env, step_id = _with_our_names(env)

        def number(name: str, default: int | None = None) -> int:
            text = env.get(name)
            if text is None and default is not None:
                return default
            if text is None or not text.strip().isdecimal():
                problems.append(
                    f"environment variable {name}={text!r}: must be a whole number; start ranks with a launcher"
                )
                return 0
            return int(text)

        alone = "RANK" not in env and "WORLD_SIZE" not in env  # true if `python -m moe_dist.train` is started by hand
        rank, world_size = number("RANK", 0 if alone else None), number("WORLD_SIZE", 1 if alone else None)
        one_per_node = world_size == 1 or not {"LOCAL_RANK", "LOCAL_WORLD_SIZE"} & env.keys()  # as in pods of Kubernetes
        local_rank = number("LOCAL_RANK", 0 if one_per_node else None)
        local_world_size = number("LOCAL_WORLD_SIZE", 1 if one_per_node else None)
        attempt = number("MOE_DIST_ATTEMPT", number("TORCHELASTIC_RESTART_COUNT", 0))  # torchrun sets the second variable
        if not problems:
            for name, value, size in (("RANK", rank, world_size), ("LOCAL_RANK", local_rank, local_world_size)):
                if value >= size:
                    problems.append(f"environment variable {name}={value}: must be below the number of ranks, {size}")
            if local_world_size > world_size:
                problems.append(f"LOCAL_WORLD_SIZE={local_world_size} is larger than WORLD_SIZE={world_size}")
        step_id = step_id if world_size > 1 else ""  # one srun step may start several one-rank runs one after another
        init_method = _init_method(env, world_size) or (PUBLISHED if step_id else "")  # `find` compares step ids
        if not init_method:
            problems.append(
                "no rendezvous for the ranks: set MASTER_ADDR and MASTER_PORT to a port of rank 0's node, or "
                "MOE_DIST_INIT_METHOD (published, file:///a/shared/path or tcp://host:port)"
            )
        drawn = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        attempt_id = env.get("MOE_DIST_ATTEMPT_ID") or step_id or drawn
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", attempt_id):  # restricted, because the id becomes part of file names
            problems.append(f"MOE_DIST_ATTEMPT_ID={attempt_id!r}: only letters, digits, '.', '_' and '-', at most 100")
        if problems:
            raise ConfigError(problems)
        launched = bool(env.get("MOE_DIST_ATTEMPT_ID"))  # only moe_dist's launchers set MOE_DIST_ATTEMPT_ID
        ranks = (rank, world_size, local_rank, local_world_size)
        return cls(*ranks, init_method, attempt, attempt_id, launched, _grace(env))


def limit_fragmentation(variables: MutableMapping[str, str]) -> None:
    """Lets torch's CUDA allocator grow its segments, unless the user has configured the allocator. Call this function
    before torch is imported.

    In each micro-batch, each layer receives a different number of rows and so allocates buffers of different sizes. If
    segments could not grow, free memory would be split into pieces of unsuitable sizes. A run could then fail although much
    memory is free.
    """
    if not any(name in variables for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        variables["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def share_cores(local_world_size: int, env: MutableMapping[str, str]) -> bool:
    """Sets OMP_NUM_THREADS to the node's number of cores divided by its ranks, at least 1, unless the variable is already
    set. Returns whether it was set here. Call this function before torch, which reads the variable, is imported."""
    if env.get(THREADS):
        return False
    usable = len(os.sched_getaffinity(0))  # less than the node's cores if a container or the scheduler binds the process
    share = usable // local_world_size
    if (cpus := env.get("SLURM_CPUS_ON_NODE", "")).isdecimal():  # Slurm may have bound each task to its part of the CPUs
        share = min(usable, int(cpus) // local_world_size)
    env[THREADS] = str(max(1, share))
    return True


def _with_our_names(env: Mapping[str, str]) -> tuple[Mapping[str, str], str]:
    """Returns `env`, and a name that all tasks of one srun share (empty for other launchers). If `env` has neither RANK nor
    WORLD_SIZE, copies the variables of mpirun or srun to torchrun's names."""
    names = next((names for names in _OTHER_NAMES if all(name in env for name in names)), None)
    if names is None or "RANK" in env or "WORLD_SIZE" in env:
        return env, ""
    ours: dict[str, str] = dict(zip(_NAMES, (env[name] for name in names), strict=True))
    if names[0] != "SLURM_PROCID":
        return {**env, **ours}, ""
    ours["LOCAL_WORLD_SIZE"] = str(1 + ours["LOCAL_WORLD_SIZE"].count(","))
    ours["MOE_DIST_ATTEMPT"] = restarts = env.get("SLURM_RESTART_COUNT", "0")  # restarts of the Slurm job
    return {**env, **ours}, f"srun-{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}-{restarts}"


def _init_method(env: Mapping[str, str], world_size: int) -> str:
    if env.get("MOE_DIST_INIT_METHOD"):
        return env["MOE_DIST_INIT_METHOD"]
    if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        return "env://"  # with tcp:// rank 0 would open a second store besides torchrun's
    return ALONE if world_size == 1 else ""


def _grace(env: Mapping[str, str]) -> float:
    text = env.get("MOE_DIST_GRACE_SECONDS", str(DEFAULT_GRACE_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0.0 < seconds < float("inf"):  # also rejects nan
        raise ConfigError(f"environment variable MOE_DIST_GRACE_SECONDS={text!r}: must be a positive number of seconds")
    return seconds
