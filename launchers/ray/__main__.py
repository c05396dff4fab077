"""Starts a run on a Ray cluster: ray job submit --working-dir . -- python -m launchers.ray CONFIG [key=value ...]

python -m launchers.ray CONFIG [key=value ...]                     runs the driver, in a job or on a node of the cluster
python -m launchers.ray CONFIG [key=value ...] --submit ADDRESS    submits the driver as a job and follows its log
python -m launchers.ray --stop ID [--submit ADDRESS]               stops a job and waits until it has saved
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from launchers.command import JobPlan, absolute_paths, commands_text, rank_commands, relative_paths
from launchers.launcher import ClusterName, Examination, Launcher, Overrides, Overwrite
from launchers.ray import submit as ray_submit
from launchers.ray.job import check_job, path_on_nodes
from launchers.ray.nodes import bundle_of_rank
from moe_dist.config.cluster import FOLDER as CLUSTERS
from moe_dist.config.cluster import VARIABLE as CLUSTER_VARIABLE
from moe_dist.config.cluster import Cluster, cluster_file, load_cluster
from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE, ConfigError
from moe_dist.plan.preflight import PlannedLayout, layout_of_file
from moe_dist.runtime.command_line import RUN_FOLDER_FIX, reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult
from moe_dist.runtime.signals import StopSignals

DASHBOARD = "http://127.0.0.1:8265"  # Ray's own default


def launch(config_path: Path, overrides: Sequence[str] = (), **options: Any) -> int:
    """Runs the driver: checks a run, starts its ranks on this process's Ray cluster, waits for them, and returns the
    run's exit code. Must be called in the main thread, because the function installs signal handlers. `options` are the
    keyword arguments of `check_job`. Raises MoeDistError before any rank is started if the run is invalid, or if the
    cluster lacks the nodes of the plan."""
    with StopSignals() as signals:  # also handles signals that come before the first attempt
        if (job := check_job(config_path, overrides, **options)) is None:
            return EXIT_DONE
        from launchers.ray.driver import drive  # imported after the check of the run, because importing Ray takes seconds

        return drive(job, signals)


def driver_line(config_path: Path, overrides: Sequence[str], *, options: Sequence[str], cluster: str | None) -> str:
    """Returns the shell line of a job that runs the driver with these command line `options`. If the configuration has
    relative paths, the line overrides these paths with absolute paths below the current folder. Raises ConfigError if the
    configuration or the cluster file is invalid."""
    config = load_config(config_path, overrides)
    site = load_cluster(cluster, os.environ)
    name = cluster or os.environ.get(CLUSTER_VARIABLE)
    file = cluster_file(cluster, os.environ)
    if name and file is not None:
        options = [*options, f"--cluster={name if file.parent == CLUSTERS else path_on_nodes(file)}"]
    paths = absolute_paths(config, Path.cwd()) if relative_paths(config) else ()
    return ray_submit.entrypoint([str(path_on_nodes(config_path)), *overrides, *paths, *options], site.python)


def _print_dry_run(config: Path, overrides: Sequence[str], cluster: str | None) -> None:
    """Prints the plan, the Ray resources of each rank and the command of each rank. Needs no data and no cluster."""
    job = check_job(config, overrides, cluster=cluster, read=layout_of_file)  # prints the plan
    if job is None:  # the run is finished
        return
    commands = rank_commands(job.launch)
    commands = [replace(command, env=job.cluster.network_variables | command.env) for command in commands]
    lines = commands_text(commands).replace(
        " '' -m ", " python -m "
    )  # the rank's node may have another interpreter, so `python` is shown
    print(f"resources of a rank: {bundle_of_rank(job.launch.job, job.cluster.cpus_per_rank)}\n{lines}")


def main(
    config: Annotated[Path | None, typer.Argument(help="Configuration of the run, a YAML file.")] = None,
    overrides: Overrides = None,
    submit: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Submit as a job to this address of Ray's dashboard, and follow its log."),
    ] = None,
    stop: Annotated[str | None, typer.Option(metavar="ID", help="Stop this job and wait until it has saved.")] = None,
    cluster: ClusterName = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, ranks and the job; start nothing.")] = False,
    max_restarts: Annotated[
        int | None, typer.Option(min=0, help="Automatic restarts from the last checkpoint, instead of the cluster file's.")
    ] = None,
    wait_for_nodes: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Seconds to wait for missing nodes; default 5 for the first attempt, 300 for a restart."
        ),
    ] = None,
    grace: Annotated[int, typer.Option(min=1, help="With --submit: seconds for saving and stopping.")] = 300,
    env: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An environment variable to pass to the ranks.")
    ] = None,
    env_file: Annotated[Path | None, typer.Option(hidden=True)] = None,  # file by which --submit passes --env to the driver
) -> None:
    """Run on a Ray cluster, with one actor and one process per rank. Without --submit or --stop this is the driver: run it
    in a job (`ray job submit`) or on a node of the cluster."""
    drives = stop is None and config is not None and not dry_run and submit is None
    options = [f"--max-restarts={max_restarts}"] if max_restarts is not None else []
    options += ["--overwrite"] if overwrite else []
    options += [f"--wait-for-nodes={wait_for_nodes:g}"] if wait_for_nodes is not None else []
    own, forwarded, code = tuple(overrides or ()), tuple(env or ()), EXIT_DONE
    try:
        with reports_errors(storage=RUN_FOLDER_FIX):
            if stop is not None:
                code = ray_submit.stop(submit or DASHBOARD, stop)
            elif config is None:
                raise ConfigError("CONFIG is missing: name the YAML file of the run, as configs/adamoe_moma_tiny_cpu.yaml")
            elif dry_run:
                paths = absolute_paths(load_config(config, own), Path.cwd())
                _print_dry_run(config, [*own, *paths], cluster)
                print(driver_line(config, own, options=options, cluster=cluster))
            elif submit is not None:
                line = driver_line(config, own, options=options, cluster=cluster)
                run = load_config(config, own)
                code = ray_submit.submit(submit, line, grace_seconds=grace, config=run, forwarded=forwarded)
            else:
                forwarded += ray_submit.take_over(env_file) if env_file is not None else ()
                driver = {"overwrite": overwrite, "max_restarts": max_restarts, "wait_seconds": wait_for_nodes}
                code = launch(config, own, **driver, cluster=cluster, forwarded=forwarded)
            raise typer.Exit(code)
    except typer.Exit as end:
        # Only the driver's log ends with the verdict. Outside a job, an invalid run ends with an error message, which
        # needs no verdict.
        if drives and (ray_submit.IN_JOB in os.environ or end.exit_code != ConfigError.exit_code):
            print(ray_submit.verdict_line(end.exit_code), flush=True)
        raise


class RayLauncher(Launcher):
    """Starts a run on a Ray cluster, with one actor per rank."""

    main = staticmethod(main)

    def plan(self, layout: PlannedLayout, cluster: Cluster) -> JobPlan:
        if problems := relative_paths(layout.config):
            raise ConfigError([f"{problem}; give absolute paths, or use --submit" for problem in problems])
        return super().plan(layout, cluster)

    def examine(self, asked: Examination) -> Iterator[CheckResult]:
        from launchers.doctor.probe import examine_cluster
        from launchers.ray import checks
        from launchers.ray.driver import connected

        with connected(asked.env) as parts:
            scheduled = checks.check_ray(asked.plan, asked.cluster, parts, asked.save_seconds, asked.env)
            yield from examine_cluster(asked, scheduled, partial(checks.run_on_nodes, asked.plan, asked.cluster))


if __name__ == "__main__":
    run_command(main)
