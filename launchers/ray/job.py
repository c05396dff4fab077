"""A run as the driver for Ray carries it out: checked and planned, before anything is connected to. No Ray here."""

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.command import TRAIN, JobPlan, absolute_paths, plan_job
from launchers.ray.nodes import islands
from launchers.restart import DEFAULT_MAX_RESTARTS
from moe_dist.config.bundled import find_config, source_root
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.shared_folder import relative_paths


@dataclass(frozen=True)
class RayJob:
    """A run as the driver carries it out.

    Attributes:
        config: Path of the YAML file, the same on every node: absolute, or relative to the working directory of the job.
        overrides: `key=value`.
        plan: Nodes and their ranks.
        cluster: The site.
        folder, data: The run's folder and the data's, which all nodes share.
        max_failures: How often a failure is followed by a new attempt, see `launchers.restart`.
        wait_seconds: For nodes that the cluster does not have; None takes SETTLE_SECONDS at first, REPLACE_SECONDS later.
        program: What each rank's interpreter runs.
        forwarded: Variables of this process that the ranks get as well, outside of a job.
        together: Nodes of the plan that must share a domain; empty where the site declares none.
    """

    config: Path
    overrides: tuple[str, ...]
    plan: JobPlan
    cluster: Cluster
    folder: RunFolder
    data: Path
    max_failures: int
    wait_seconds: float | None
    program: tuple[str, ...]
    forwarded: tuple[str, ...] = ()
    together: tuple[tuple[int, ...], ...] = ()


def check_job(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    overwrite: bool = False,
    max_failures: int = DEFAULT_MAX_RESTARTS,
    wait_seconds: float | None = None,
    forwarded: Sequence[str] = (),
    program: tuple[str, ...] = TRAIN,
) -> RayJob | None:
    """Checks a run and plans its job; None where it is finished already, and its summary was shown.

    Args:
        cluster: Name or path of the cluster file.
        overwrite: Move an old run of this name aside.

    Raises:
        MoeDistError: the run cannot be as it is written, or not at this site.
    """
    require_variables(forwarded, os.environ)
    site = load_cluster(cluster, os.environ)
    preflight = check_file(config_path, overrides)
    config = preflight.config
    if problems := relative_paths(config):
        fix = f"as in {' '.join(absolute_paths(config, Path('/shared/folder')))}"
        raise ConfigError([f"{problem}; {fix}" for problem in problems], see="docs/ray.md")
    plan, folder = plan_job(preflight, site), RunFolder.of(config)
    if overwrite and (old := folder.move_aside()) is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    start = folder.inspect(config)
    if start is Start.FINISHED:
        print(folder.read_summary())
        return None
    print(f"{plan.world_size} ranks; run folder {folder.path} ({start.value}), logs in {folder.logs}\n{plan.table()}")
    return RayJob(
        config=seen_from_the_job(config_path),
        overrides=tuple(overrides),
        plan=plan,
        cluster=site,
        folder=folder,
        data=Path(config.data.path),
        max_failures=max_failures,
        wait_seconds=wait_seconds,
        program=program,
        forwarded=tuple(forwarded),
        together=() if site.domain_nodes is None else tuple(islands(plan, config.parallel.ep)),
    )


def require_variables(names: Sequence[str], env: Mapping[str, str]) -> None:
    """For --env NAME.

    Raises:
        ConfigError: a variable is not there.
    """
    if missing := [name for name in names if name not in env]:
        raise ConfigError([f"--env {name}: there is no such variable here" for name in missing])


def seen_from_the_job(path: Path) -> Path:
    """A configuration's path as every node has it: relative where it comes with the code, which Ray ships; else absolute."""
    absolute, root = find_config(path).absolute(), source_root()
    return absolute.relative_to(root) if absolute.is_relative_to(root) else absolute
