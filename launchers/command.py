"""Plans the nodes and ranks of a job, and the command and environment of each rank. All launchers use these plans."""

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from moe_dist.config.cluster import Cluster
from moe_dist.config.schema import Config
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.plan.nodes import demands, groups_of_rank, pack
from moe_dist.plan.preflight import PlannedLayout
from moe_dist.runtime.environment import PUBLISHED
from moe_dist.runtime.place import PLACE, RunPlace
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

TRAIN: tuple[str, ...] = ("-m", "moe_dist.train")
ReadRun = Callable[[Path, Sequence[str]], PlannedLayout]  # `check_file`; in a dry run `layout_of_file`, which needs no data


@dataclass(frozen=True)
class NodePlan:
    """One node of a job.

    Attributes:
        index: Number of the node in the job, from 0.
        ranks: Ranks on this node, ordered by local rank; the rank numbers need not be consecutive.
        feature, labels: The Slurm feature and the Ray labels that the node must have.
        groups: Names of the expert groups whose experts are on this node.
        own: True if the node is reserved for these groups, so that no other group and no other job may use the node.
    """

    index: int
    ranks: tuple[int, ...]
    feature: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()
    own: bool = False

    @property
    def ray_labels(self) -> Mapping[str, str]:
        """Returns `labels`. If there are none, returns the Slurm feature as a label with the name `feature`."""
        return self.labels or ({"feature": self.feature} if self.feature is not None else {})


@dataclass(frozen=True)
class JobPlan:
    """The nodes of a job and the ranks on each node.

    Attributes:
        nodes: The planned nodes, ordered by index.
        gpus_per_node: Number of GPUs that each node must have; 0 for a run on CPUs.
        groups: For each rank, the names of the expert groups that have experts on it.
        block: Number of consecutive ranks that must share a node (parallel.dispatch.ranks_per_node).
    """

    nodes: tuple[NodePlan, ...]
    gpus_per_node: int = 0
    groups: tuple[tuple[str, ...], ...] = ()
    block: int = 1

    @property
    def world_size(self) -> int:
        return sum(len(node.ranks) for node in self.nodes)

    @property
    def ranks_per_node(self) -> int:
        """Returns the largest number of ranks on one node."""
        return max(len(node.ranks) for node in self.nodes)

    def node_of(self, rank: int) -> NodePlan:
        return self.nodes[self._index_of_rank[rank]]

    @cached_property
    def _index_of_rank(self) -> Mapping[int, int]:
        return {rank: node.index for node in self.nodes for rank in node.ranks}

    def place_of(self, rank: int, hosts: Sequence[str] = ()) -> RunPlace:
        """Returns the planned node, local rank and GPU of a rank. `hosts` has the host names ordered by node index, or is
        empty if no nodes are allocated yet."""
        node = self.node_of(rank)
        local = node.ranks.index(rank)
        return RunPlace(
            rank=rank,
            node=node.index,
            local_rank=local,
            groups=self.groups[rank] if self.groups else (),
            host=hosts[node.index] if hosts else None,
            feature=node.feature,
            labels=node.ray_labels,
            gpu=local if self.gpus_per_node else None,
        )

    def table(self, hosts: Sequence[str] = ()) -> str:
        """Returns a readable table with one line per node; `hosts` are the host names ordered by node index."""
        rows = [("node", "ranks", "needs", "experts of")]
        for node in self.nodes:
            needs = [node.feature] if node.feature else []
            needs += [f"{name}={value}" for name, value in node.labels.items()]
            name = hosts[node.index] if hosts else str(node.index)
            rows.append((name, rank_ranges(node.ranks), ", ".join(needs) or "-", ", ".join(node.groups) or "-"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def one_node(world_size: int) -> JobPlan:
    """Returns a plan with all ranks on one node and no requirements on that node."""
    return JobPlan((NodePlan(0, tuple(range(world_size))),))


def plan_job(layout: PlannedLayout, cluster: Cluster) -> JobPlan:
    """Assigns ranks to nodes according to the configuration, the expert placement and the cluster file.

    Raises:
        ConfigError: an EP group is larger than a fast-interconnect domain of the cluster, or
            parallel.dispatch.ranks_per_node does not match the planned nodes.
        ResourceError: the run needs GPUs and the cluster has none.
    """
    config, placement = layout.config, layout.placement
    device, has_gpus = config.parallel.device, cluster.gpus.syntax != "none"
    if device == "cuda" and not has_gpus:
        raise ResourceError(
            "parallel.device=cuda: the cluster file says that there are no GPUs (gpus.syntax: none); choose another "
            "cluster file, or set parallel.device=cpu"
        )
    gpus = cluster.gpus.per_node if has_gpus and device != "cpu" else 0
    packed = pack(
        demands(config.placement, placement),
        edp=config.parallel.edp,
        ranks_per_node=gpus or cluster.ranks_per_node,  # one rank per GPU
        domain_nodes=cluster.domain_nodes,  # an EP group stays in one domain
        stage=config.engine.groups_of_stage(config.parallel),
    )
    of_rank = tuple(groups_of_rank(placement, rank) for rank in range(config.parallel.ep * config.parallel.edp))
    names = [group.name for group in placement.groups]
    nodes = tuple(
        NodePlan(
            index=index,
            ranks=ranks,
            feature=demand.feature,
            labels=demand.labels,
            groups=tuple(name for name in names if any(name in of_rank[rank] for rank in ranks)),
            own=bool(demand.owner),
        )
        for index, (demand, ranks) in enumerate(packed)
    )
    plan = JobPlan(nodes, gpus, of_rank, config.parallel.dispatch.node_size or 1)
    _check_dispatch_nodes(config, plan)
    return plan


def _check_dispatch_nodes(config: Config, plan: JobPlan) -> None:
    size = config.parallel.dispatch.node_size
    if size is None:
        return
    for first in range(0, plan.world_size, size):
        nodes = sorted({plan.node_of(rank).index for rank in range(first, first + size)})
        if len(nodes) > 1:
            raise ConfigError(
                f"parallel.dispatch.ranks_per_node={size}: ranks {first} to {first + size - 1} must share a node, but "
                f"the plan puts them on the nodes {', '.join(map(str, nodes))}; set it to a divisor of the number of "
                "ranks per node in the cluster file, or change placement.groups.<group>.node"
            )


def rank_ranges(ranks: Sequence[int]) -> str:
    """Formats ranks in short form, such as `0-3, 6`."""
    parts: list[list[int]] = []
    for rank in ranks:
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    return ", ".join(str(part[0]) if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)


def ranks_of(ranks: Sequence[int]) -> str:
    """Names ranks: 'rank 3', or 'ranks 0-2, 5'."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {rank_ranges(ranks)}"


@dataclass(frozen=True)
class RankCommand:
    """The program and arguments that start one rank on its node, and the variables to add to the node's environment."""

    rank: int
    node: int
    argv: tuple[str, ...]
    env: dict[str, str]


@dataclass(frozen=True)
class LaunchPlan:
    """One attempt of a run, before its ranks are started.

    Attributes:
        config: Path of the YAML file, readable on every node.
        rendezvous: Environment variables for torch's rendezvous: PUBLISHED_RENDEZVOUS or the result of `file_rendezvous`.
        grace_seconds: Time from a stop signal until a rank that has not ended is killed.
        loopback: True if all ranks are on this machine. Gloo then binds to the loopback interface.
        threads: OMP_NUM_THREADS of each rank. With None, the ranks of a node share its cores (`environment.share_cores`).
        program: Arguments of the Python interpreter that precede the configuration's path, such as `-m moe_dist.train`.
        hosts: Host names ordered by node index; empty if the launcher does not know the host names.
    """

    config: Path
    overrides: tuple[str, ...]
    job: JobPlan
    rendezvous: Mapping[str, str]
    attempt: int
    attempt_id: str
    grace_seconds: float = DEFAULT_GRACE_SECONDS
    loopback: bool = False
    threads: int | None = None
    python: str = sys.executable
    program: tuple[str, ...] = TRAIN
    hosts: tuple[str, ...] = ()


# Rank 0 listens at a free port, and writes its address into the shared run folder, where only the run's user can read it.
PUBLISHED_RENDEZVOUS: Mapping[str, str] = {"MOE_DIST_INIT_METHOD": PUBLISHED}


def file_rendezvous(path: Path) -> dict[str, str]:
    """Returns the environment variables for a rendezvous through a new file at `path`, which all ranks can access."""
    return {"MOE_DIST_INIT_METHOD": f"file://{path.absolute()}"}


def rank_commands(plan: LaunchPlan) -> tuple[RankCommand, ...]:
    """Returns the program, arguments and environment of each rank, ordered by rank."""
    shared = {
        **plan.rendezvous,
        "WORLD_SIZE": str(plan.job.world_size),
        "MOE_DIST_ATTEMPT": str(plan.attempt),
        "MOE_DIST_ATTEMPT_ID": plan.attempt_id,
        "MOE_DIST_GRACE_SECONDS": f"{plan.grace_seconds:g}",
        "PYTHONUNBUFFERED": "1",  # without buffers, the log has the last output of a killed rank
        "PYTHONFAULTHANDLER": "1",  # prints a traceback on SIGSEGV and similar signals
    }
    if plan.loopback:
        shared["GLOO_SOCKET_IFNAME"] = "lo"  # gloo binds to loopback, so that other machines cannot connect
    if plan.threads is not None:
        shared["OMP_NUM_THREADS"] = str(plan.threads)
    argv = (plan.python, *plan.program, str(plan.config), *plan.overrides)
    commands = []
    for rank in range(plan.job.world_size):
        place, size = plan.job.place_of(rank, plan.hosts), len(plan.job.node_of(rank).ranks)
        own = {"RANK": str(rank), "LOCAL_RANK": str(place.local_rank), "LOCAL_WORLD_SIZE": str(size)}
        commands.append(RankCommand(rank, place.node, argv, {**shared, **own, PLACE: place.to_json()}))
    return tuple(commands)


def commands_text(commands: Sequence[RankCommand]) -> str:
    """Returns the text of a dry run. It has one line per rank, with the rank's node and its shell command."""
    lines = []
    for command in commands:
        variables = [f"{name}={value}" for name, value in sorted(command.env.items())]
        lines.append(f"rank {command.rank}, node {command.node}: {shlex.join(['env', *variables, *command.argv])}")
    return "\n".join(lines)


def paths_of(config: Config) -> dict[str, str]:
    """Returns the paths in a configuration by their keys, without keys whose value is null."""
    paths = {"run.root": config.run.root, "data.path": config.data.path}
    paths |= {"run.init_from": config.run.init_from, "model.folder": config.model.folder}
    return {key: path for key, path in paths.items() if path is not None}


def absolute_paths(config: Config, base: Path) -> tuple[str, ...]:
    """Returns overrides that make all paths absolute, so that they are valid in every working directory. Relative paths
    start at `base`."""
    return tuple(f"{key}={os.path.normpath(base / path)}" for key, path in paths_of(config).items())


def relative_paths(config: Config) -> list[str]:
    """Returns an error message for each relative path in the configuration. Nodes with different working directories
    would resolve such a path to different folders."""
    relative = [(key, path) for key, path in paths_of(config).items() if not Path(path).is_absolute()]
    return [f"{key}={path!r}: must be absolute on a cluster, and the same folder on all nodes" for key, path in relative]


def fit_world_size(config: Config, num_ranks: int | None) -> tuple[str, ...]:
    """Returns the override of parallel.edp that gives the run `num_ranks` ranks; no override if the run already has
    this number of ranks, or if `num_ranks` is None. Raises ConfigError if `num_ranks` is no multiple of parallel.ep."""
    ep, edp = config.parallel.ep, config.parallel.edp
    if num_ranks is None or num_ranks == ep * edp:
        return ()
    if num_ranks < 1 or num_ranks % ep:
        raise ConfigError(
            f"{num_ranks} ranks: must be a positive multiple of parallel.ep={ep}, so that every EP group is complete; "
            "choose another number, or set parallel.ep"
        )
    return (f"parallel.edp={num_ranks // ep}",)
