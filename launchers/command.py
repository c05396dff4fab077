"""The one place that turns a plan into ranks. Launchers only carry out what it says."""

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError
from moe_dist.runtime.environment import PUBLISHED
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

TRAIN: tuple[str, ...] = ("-m", "moe_dist.train")


@dataclass(frozen=True)
class RankCommand:
    """What to start for one rank.

    Attributes:
        rank: Over all nodes.
        node: Index of the node it belongs on.
        argv: Program and arguments.
        env: Variables to set on top of those of the node; all others, CUDA's above all, are left alone.
    """

    rank: int
    node: int
    argv: tuple[str, ...]
    env: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """A start of a run.

    Attributes:
        config: Path of the YAML file, readable on every node.
        overrides: `key=value`.
        ranks_per_node: Ranks of each node; ranks are counted through node by node.
        rendezvous: Variables by which the ranks find each other, see `published_rendezvous`, `file_rendezvous` and
            `tcp_rendezvous`.
        attempt: How often this job was restarted.
        attempt_id: Name of this start, never used before.
        grace_seconds: Time that a rank has to stop when asked to.
        loopback: All ranks are on this machine: gloo stays off the network cards.
        threads: CPU threads of a rank; None leaves them alone.
        python: Interpreter.
        program: What it runs, before the configuration.
    """

    config: Path
    overrides: tuple[str, ...]
    ranks_per_node: tuple[int, ...]
    rendezvous: Mapping[str, str]
    attempt: int
    attempt_id: str
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    loopback: bool = False
    threads: int | None = None
    python: str = sys.executable
    program: tuple[str, ...] = TRAIN

    @property
    def world_size(self) -> int:
        return sum(self.ranks_per_node)


def file_rendezvous(path: Path) -> dict[str, str]:
    """Ranks meet in a new file on a file system that all of them see."""
    return {"MOE_DIST_INIT_METHOD": f"file://{path.absolute()}"}


def published_rendezvous() -> dict[str, str]:
    """Ranks meet at a port that the kernel gives rank 0, which publishes it in the run folder for them alone: for ranks on
    several nodes that share the folder."""
    return {"MOE_DIST_INIT_METHOD": PUBLISHED}


def tcp_rendezvous(host: str, port: int) -> dict[str, str]:
    """Ranks meet at a port of the node of rank 0 that somebody has chosen and kept free."""
    return {"MASTER_ADDR": host, "MASTER_PORT": str(port)}


def rank_commands(plan: Plan) -> tuple[RankCommand, ...]:
    """Program, arguments and environment of each rank, in the order of the ranks."""
    shared = {
        **plan.rendezvous,
        "WORLD_SIZE": str(plan.world_size),
        "MOE_DIST_ATTEMPT": str(plan.attempt),
        "MOE_DIST_ATTEMPT_ID": plan.attempt_id,
        "MOE_DIST_GRACE_SECONDS": f"{plan.grace_seconds:g}",
        "PYTHONUNBUFFERED": "1",  # what a rank said before it was killed is in its log
        "PYTHONFAULTHANDLER": "1",
    }
    if plan.loopback:
        shared["GLOO_SOCKET_IFNAME"] = "lo"
    if plan.threads is not None:
        shared["OMP_NUM_THREADS"] = str(plan.threads)
    argv = (plan.python, *plan.program, str(plan.config), *plan.overrides)
    places = [(node, local, size) for node, size in enumerate(plan.ranks_per_node) for local in range(size)]
    return tuple(
        RankCommand(
            rank=rank,
            node=node,
            argv=argv,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(size)},
        )
        for rank, (node, local, size) in enumerate(places)
    )


def fit_world_size(config: Config, num_ranks: int | None) -> tuple[str, ...]:
    """The overrides that make a configuration fit a number of ranks; none where it does already, or None is asked for.

    Raises:
        ConfigError: the number is no multiple of parallel.ep.
    """
    ep, edp = config.parallel.ep, config.parallel.edp
    if num_ranks is None or num_ranks == ep * edp:
        return ()
    if num_ranks < 1 or num_ranks % ep:
        raise ConfigError(
            f"{num_ranks} ranks: must be a positive multiple of parallel.ep={ep}, since EP groups are whole; choose "
            "another number, or set parallel.ep"
        )
    return (f"parallel.edp={num_ranks // ep}",)


def threads_per_rank(ranks: int, env: Mapping[str, str]) -> int | None:
    """CPU threads of each of `ranks` ranks on this machine: an even share of the cores we may use, at least 1. None where
    OMP_NUM_THREADS is set already: then somebody has decided."""
    if "OMP_NUM_THREADS" in env:
        return None
    return max(1, len(os.sched_getaffinity(0)) // ranks)
