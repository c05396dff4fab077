"""Run on a Ray cluster: ray job submit --working-dir . -- python -m launchers.ray CONFIG [key=value ...]

    python -m launchers.ray CONFIG [key=value ...]                     the driver, inside a job or on a node of the cluster
    python -m launchers.ray CONFIG [key=value ...] --submit ADDRESS    submits the driver as a job, and follows it
    python -m launchers.ray --stop ID [--submit ADDRESS]               stops a job, and waits for its save
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import typer

from launchers.attempts import begin_logs, until_it_ends
from launchers.command import (
    TRAIN,
    JobPlan,
    Plan,
    absolute_paths,
    plan_job,
    published_rendezvous,
    rank_commands,
)
from launchers.ending import Outcome, Patience
from launchers.ray_nodes import bundle_of_rank
from launchers.restart import DEFAULT_MAX_RESTARTS
from launchers.save_time import measured_save_seconds
from launchers.supervise import StopSignals
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError
from moe_dist.preflight import check_file
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.place import LABELS
from moe_dist.runtime.rendezvous import HOST_VARIABLE
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.shared_folder import relative_paths
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

ROOT = Path(__file__).parents[1]
GUIDE = "docs/ray.md"
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"  # Ray kills the driver so long after `ray job stop`
STOP_WAIT_DEFAULT = 3.0
MARGIN_SECONDS = 10.0  # of Ray's grace that is left for the driver when the ranks' own is over
SETTLE_SECONDS = 5.0  # at the first start: nodes that are not there will not come
REPLACE_SECONDS = 300.0  # after a failure: a lost node is being replaced
Replies = tuple[Outcome, Sequence[int]]


@dataclass(frozen=True)
class Job:
    """A run as the driver carries it out.

    Attributes:
        config: Path of the YAML file, the same on every node: absolute, or relative to the working directory of the job.
        overrides: `key=value`.
        plan: Nodes and their ranks.
        cluster: The site.
        folder: The run's, which all nodes share.
        data: Folder of the data, likewise.
        grace_seconds: What a rank has for a stop.
        max_failures: Restarts.
        wait_seconds: For nodes that the cluster does not have; None takes SETTLE_SECONDS at first, REPLACE_SECONDS later.
        program: What each rank's interpreter runs.
    """

    config: Path
    overrides: tuple[str, ...]
    plan: JobPlan
    cluster: Cluster
    folder: RunFolder
    data: Path
    grace_seconds: float
    max_failures: int
    wait_seconds: float | None
    program: tuple[str, ...]


def launch(
    config_path: Path,
    overrides: Sequence[str] = (),
    *,
    cluster: str | None = None,
    overwrite: bool = False,
    max_failures: int = DEFAULT_MAX_RESTARTS,
    wait_seconds: float | None = None,
    program: tuple[str, ...] = TRAIN,
) -> int:
    """The driver: checks a run, starts its ranks on the cluster that this process belongs to, and sees them through. Call
    it in the main thread.

    Args:
        cluster: Name or path of the cluster file.
        overwrite: Move an old run of this name aside, once.
        max_failures: How often a failure is followed by a new attempt, see `launchers.restart`.
        wait_seconds: For nodes that the cluster does not have.
        program: What each rank's interpreter runs.

    Returns:
        The verdict of the run.

    Raises:
        MoeDistError: found before a rank was started, or while there is no node for it.
    """
    site = load_cluster(cluster, os.environ)
    preflight = check_file(config_path, overrides)
    if faults := relative_paths(preflight.config):
        way_out = f"as in {' '.join(absolute_paths(preflight.config, Path('/shared/folder')))}"
        raise ConfigError([f"{fault}; {way_out}" for fault in faults], see=GUIDE)
    plan = plan_job(preflight, site)
    folder = RunFolder.of(preflight.config)
    if overwrite and (old := folder.move_aside()) is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    start = folder.inspect(preflight.config)
    if start is Start.FINISHED:
        print(folder.read_summary())
        return EXIT_DONE
    print(f"{plan.world_size} ranks; run folder {folder.path} ({start.value}), logs in {folder.logs}\n{plan.table()}")
    grace = stop_grace(os.environ)
    job = Job(
        config=_seen_from_everywhere(config_path),
        overrides=tuple(overrides),
        plan=plan,
        cluster=site,
        folder=folder,
        data=Path(preflight.config.data.path),
        grace_seconds=max(1.0, grace - MARGIN_SECONDS) if grace is not None else DEFAULT_GRACE_SECONDS,
        max_failures=max_failures,
        wait_seconds=wait_seconds,
        program=program,
    )
    print(grace_text(grace, measured_save_seconds(folder)), file=sys.stderr)
    return _drive(job)
