"""Checks and plans a run for the Ray driver, before it connects to a cluster. Does not import Ray."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launchers.attempts import inspect_folder
from launchers.command import (
    PUBLISHED_RENDEZVOUS,
    TRAIN,
    LaunchPlan,
    ReadRun,
    absolute_paths,
    plan_job,
    relative_paths,
)
from launchers.ray.nodes import nodes_sharing_ep_groups
from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.run_folder import RunFolder, Start


@dataclass(frozen=True)
class RayJob:
    """A checked and planned run.

    Attributes:
        launch: The plan of the first attempt. For each attempt, the driver replaces plan, hosts, attempt and grace period.
        folder, data: Run folder and data folder, on a file system that all nodes share.
        max_restarts: Limit for the restarts of the job; by default the number in the cluster file.
        wait_seconds: Time limit of the wait for nodes that the cluster lacks; with None, driver.py's limits apply.
        variables: Environment variables for the ranks; the values may be secrets.
        together: Sets of planned nodes; the nodes of a set must share a fast-interconnect domain. Empty without domains.
    """

    launch: LaunchPlan
    cluster: Cluster
    folder: RunFolder
    data: Path
    max_restarts: int
    wait_seconds: float | None = None
    variables: dict[str, str] = field(default_factory=dict, repr=False)
    together: tuple[tuple[int, ...], ...] = ()


def check_job(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    overwrite: bool = False,
    max_restarts: int | None = None,
    wait_seconds: float | None = None,
    forwarded: Sequence[str] = (),
    program: tuple[str, ...] = TRAIN,
    read: ReadRun = check_file,
) -> RayJob | None:
    """Checks a run and plans its nodes. For a finished run, prints the summary and returns None. `RayJob` explains the
    arguments. `cluster` is the name or path of the cluster file. If `read` is `layout_of_file`, the run needs no data.
    Raises MoeDistError if the configuration is invalid, or does not fit the cluster."""
    require_variables(forwarded, os.environ)
    site = load_cluster(cluster, os.environ)
    layout = read(config_path, overrides)
    config = layout.config
    if problems := relative_paths(config):  # a node resolves a relative path in its own working directory
        absolute = absolute_paths(config, Path("/"))
        examples = (path for path in absolute_paths(config, Path("/shared/folder")) if path not in absolute)
        fix = f"as in {' '.join(examples)}"
        raise ConfigError([f"{problem}; {fix}" for problem in problems], see="docs/ray.md")
    plan, folder = plan_job(layout, site), RunFolder.of(config)
    start = inspect_folder(folder, config, overwrite=overwrite)
    if start is Start.FINISHED:
        return None
    print(f"{plan.world_size} ranks; run folder {folder.path} ({start.value}), logs in {folder.logs}\n{plan.table()}")
    launch = LaunchPlan(
        config=path_on_nodes(config_path),
        overrides=tuple(overrides),
        job=plan,
        rendezvous=PUBLISHED_RENDEZVOUS,  # the driver cannot know which port of rank 0's node is free
        attempt=0,
        attempt_id="ray-ID",
        threads=site.cpus_per_rank,
        python=site.python or "",  # an empty string stands for the interpreter of the rank's actor
        program=program,
    )
    variables = {name: os.environ[name] for name in forwarded}
    together = () if site.domain_nodes is None else tuple(nodes_sharing_ep_groups(plan, config.parallel.ep))
    limit = site.max_restarts if max_restarts is None else max_restarts
    return RayJob(launch, site, folder, Path(config.data.path), limit, wait_seconds, variables, together)


def require_variables(names: Sequence[str], env: Mapping[str, str]) -> None:
    """Raises ConfigError for each variable of --env NAME that is not set."""
    if missing := [name for name in names if name not in env]:
        raise ConfigError([f"--env {name}: this variable is not set; export it first" for name in missing])


def path_on_nodes(path: Path) -> Path:
    """Returns a configuration's path that is valid on every node. The path is relative if the file is inside the code that
    Ray copies to the nodes, otherwise absolute."""
    absolute, root = find_config(path).absolute(), source_root()
    return absolute.relative_to(root) if absolute.is_relative_to(root) else absolute
