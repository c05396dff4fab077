"""Reads rank, rendezvous and attempt of a process from the environment variables that its launcher set."""

import os
import re
import socket
import uuid
from collections.abc import Mapping
from dataclasses import dataclass

from moe_dist.errors import ConfigError
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

PUBLISHED = "published"  # rank 0 writes its address into the run folder (runtime/rendezvous.py)
RAY_METRICS = "MOE_DIST_RAY_METRICS"  # under Ray: rank 0 sends its metrics to this socket (monitor/sinks/prometheus.py)
ALONE = "tcp://127.0.0.1:0"  # init method of a single process: any free port


@dataclass(frozen=True)
class RankEnv:
    """Rank and rendezvous of one process.

    Attributes:
        rank, world_size: Global rank, and number of ranks on all nodes.
        local_rank, local_world_size: Rank and number of ranks on this node; local_rank is also the index of the GPU.
        init_method: The argument of `torch.distributed.init_process_group`, or PUBLISHED.
        attempt: Number of restarts by the launcher; 0 for the first attempt.
        attempt_id: Unique name of this attempt, equal on all its ranks.
        launched: True if a launcher of moe_dist started the process and writes standard error into the rank's log.
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
        """Reads RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MOE_DIST_INIT_METHOD (or MASTER_ADDR and MASTER_PORT, as
        torchrun sets them), MOE_DIST_ATTEMPT (or TORCHELASTIC_RESTART_COUNT), MOE_DIST_ATTEMPT_ID and
        MOE_DIST_GRACE_SECONDS. Without RANK and WORLD_SIZE the run has one process. Raises ConfigError with all problems if
        variables are missing, are no numbers, or contradict each other."""
        problems: list[str] = []

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

        alone = "RANK" not in env and "WORLD_SIZE" not in env  # a plain `python -m moe_dist.train`
        rank, world_size = number("RANK", 0 if alone else None), number("WORLD_SIZE", 1 if alone else None)
        local_rank = number("LOCAL_RANK", 0 if world_size == 1 else None)
        local_world_size = number("LOCAL_WORLD_SIZE", 1 if world_size == 1 else None)
        attempt = number("MOE_DIST_ATTEMPT", number("TORCHELASTIC_RESTART_COUNT", 0))  # the second one comes from torchrun
        if not problems:
            for name, value, size in (("RANK", rank, world_size), ("LOCAL_RANK", local_rank, local_world_size)):
                if value >= size:
                    problems.append(f"environment variable {name}={value}: must be below the number of ranks, {size}")
            if local_world_size > world_size:
                problems.append(f"LOCAL_WORLD_SIZE={local_world_size} is larger than WORLD_SIZE={world_size}")
        init_method = _init_method(env, world_size)
        if not init_method:
            problems.append(
                "no rendezvous for the ranks: set MOE_DIST_INIT_METHOD (published, file:///a/shared/path or "
                "tcp://host:port), or MASTER_ADDR and MASTER_PORT"
            )
        attempt_id = env.get("MOE_DIST_ATTEMPT_ID") or f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,100}", attempt_id):  # it becomes part of file names
            problems.append(f"MOE_DIST_ATTEMPT_ID={attempt_id!r}: only letters, digits, '.', '_' and '-', at most 100")
        if problems:
            raise ConfigError(problems)
        launched, grace_seconds = "MOE_DIST_ATTEMPT_ID" in env, _grace(env)  # only moe_dist's launchers set that variable
        ranks = (rank, world_size, local_rank, local_world_size)
        return cls(*ranks, init_method, attempt, attempt_id, launched, grace_seconds)


def _init_method(env: Mapping[str, str], world_size: int) -> str:
    """The init method; empty if there are several ranks and no variable gives one."""
    if env.get("MOE_DIST_INIT_METHOD"):
        return env["MOE_DIST_INIT_METHOD"]
    if env.get("MASTER_ADDR") and env.get("MASTER_PORT"):
        return "env://"  # not tcp://: under torchrun the agent owns the store, and only env:// connects to it
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
