"""Run on a Ray cluster: ray job submit --working-dir . -- python -m launchers.ray CONFIG [key=value ...]

python -m launchers.ray CONFIG [key=value ...]                     the driver, inside a job or on a node of the cluster
python -m launchers.ray CONFIG [key=value ...] --submit ADDRESS    submits the driver as a job, and follows it
python -m launchers.ray --stop ID [--submit ADDRESS]               stops a job, and waits for its save
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.command import absolute_paths
from launchers.ray import submit as ray_submit
from launchers.ray.job import check_job, require_variables, seen_from_the_job
from launchers.restart import DEFAULT_MAX_RESTARTS
from launchers.supervise import StopSignals
from moe_dist.config.cluster import FOLDER as CLUSTERS
from moe_dist.config.cluster import VARIABLE as CLUSTER_VARIABLE
from moe_dist.config.cluster import cluster_file, load_cluster
from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.shared_folder import relative_paths

DASHBOARD = "http://127.0.0.1:8265"  # Ray's own default


def launch(config_path: Path, overrides: Sequence[str] = (), **options: Any) -> int:
    """The driver: checks a run, starts its ranks on the cluster that this process belongs to, and sees them through. Call
    it in the main thread.

    Args:
        options: As of `launchers.ray.job.check_job`.

    Returns:
        The verdict of the run.

    Raises:
        MoeDistError: found before a rank was started, or while there is no node for it.
    """
    with StopSignals() as signals:  # also while nothing runs yet
        if (job := check_job(config_path, overrides, **options)) is None:
            return EXIT_DONE
        from launchers.ray.driver import drive  # imports Ray, which takes seconds: what can be refused is refused before

        return drive(job, signals)


def submitted(
    config_path: Path,
    overrides: Sequence[str],
    *,
    address: str,
    options: Sequence[str],
    cluster: str | None,
    grace_seconds: int,
    forwarded: Sequence[str],
) -> int:
    """Submits the driver as a job and follows it. Relative paths of the run are taken from here on as those of this clone.

    Args:
        address: Of Ray's dashboard.
        options: Of the driver.
        cluster: Name or path of the cluster file.
        grace_seconds: From a stop until Ray kills the driver.
        forwarded: Variables of this process that the job gets as well.

    Returns:
        The verdict of the run.

    Raises:
        ConfigError: the configuration, the cluster file or a variable is wrong.
        PlacementError: nobody answers at the address.
    """
    config = load_config(config_path, overrides)
    site = load_cluster(cluster, os.environ)
    require_variables(forwarded, os.environ)
    asked = cluster or os.environ.get(CLUSTER_VARIABLE)
    file = cluster_file(cluster, os.environ)
    if asked and file is not None:
        options = [*options, f"--cluster={asked if file.parent == CLUSTERS else seen_from_the_job(file)}"]
    paths = absolute_paths(config, Path.cwd()) if relative_paths(config) else ()
    arguments = [str(seen_from_the_job(config_path)), *overrides, *paths, *options]
    variables = {name: os.environ[name] for name in forwarded} | {ray_submit.STOP_WAIT: str(grace_seconds)}
    return ray_submit.submit(address, ray_submit.entrypoint(arguments, site.python), variables)


def main(
    config: Annotated[Path | None, typer.Argument(help="Configuration of the run, a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200; later ones win.")] = None,
    submit: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Submit as a job at this address of Ray's dashboard, and follow it."),
    ] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop this job, and wait until it has saved.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file, or its name in configs/clusters; default $MOE_DIST_CLUSTER.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Move an old run of this name aside.")] = False,
    max_failures: Annotated[
        int, typer.Option(min=0, help="New attempts from the last checkpoint after failures that may pass.")
    ] = DEFAULT_MAX_RESTARTS,
    wait_for_nodes: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Seconds to wait for nodes that are not there; default 5 at first, 300 once the run has failed."
        ),
    ] = None,
    grace: Annotated[int, typer.Option(min=1, help="With --submit: seconds that a stop may take.")] = 300,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="A variable of this process that the ranks get as well.")
    ] = None,
) -> None:
    """Run on a Ray cluster, one actor and one process a rank. Without --submit or --stop this is the driver itself: run it
    inside a job (`ray job submit`) or on a node of the cluster."""
    drives = False
    options = [f"--max-failures={max_failures}", *(["--overwrite"] if overwrite else [])]
    options += [f"--wait-for-nodes={wait_for_nodes:g}"] if wait_for_nodes is not None else []
    try:
        if stop is not None:
            code = ray_submit.stop(submit or DASHBOARD, stop)
        elif config is None:
            raise ConfigError("CONFIG is missing: the YAML file of the run, as configs/adamoe_moma_tiny_cpu.yaml")
        elif submit is not None:
            code = submitted(
                config,
                overrides or (),
                address=submit,
                options=options,
                cluster=cluster,
                grace_seconds=grace,
                forwarded=env or (),
            )
        else:
            drives = True
            code = launch(
                config,
                overrides or (),
                cluster=cluster,
                overwrite=overwrite,
                max_failures=max_failures,
                wait_seconds=wait_for_nodes,
                forwarded=env or (),
            )
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"{error}; the run folder is <run.root>/<run.name>: mend it, or choose another run.root", file=sys.stderr)
        code = EXIT_FAILED
    if drives:
        print(ray_submit.verdict_line(code), flush=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    run_command(main)
