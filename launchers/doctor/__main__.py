"""Checks a machine or cluster for a run: moe-dist doctor CONFIG [key=value ...] [--on LAUNCHER] [--probe]

The command checks the configuration, then the plan, and then runs the launcher's checks. It prints each result at once.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from launchers.command import JobPlan
from launchers.launcher import ClusterName, ConfigPath, Examination, Overrides
from launchers.table import launcher_table, load_launcher
from moe_dist.config.cluster import load_cluster
from moe_dist.errors import MoeDistError, ResourceError
from moe_dist.plan.preflight import check_file
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult, Level, error, exit_code, ok
from moe_dist.runtime.node.facts import Questions, look
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.status import measured_save_seconds

_MARKS = {
    Level.OK: ("ok", "green"),
    Level.NOTE: ("--", "dim"),
    Level.WARNING: ("WARN", "yellow"),
    Level.ERROR: ("FAIL", "bold red"),
}


def examine(
    config_path: Path,
    overrides: Sequence[str],
    *,
    on: str,
    cluster: str | None = None,
    probe: bool = False,
    fabric: bool = False,
    env: Mapping[str, str] = os.environ,
) -> Iterator[CheckResult]:
    """Yields the results of all checks.

    Args:
        probe: Whether to start a job of at most two minutes that checks each node.
        fabric: Whether to measure the network between every pair of nodes.
    """
    try:
        launcher, site = load_launcher(on), load_cluster(cluster, env)
        preflight = check_file(config_path, overrides)
        yield ok("configuration", f"{config_path}: model, data, ranks and placement fit together")
        plan = launcher.plan(preflight, site)
        yield ok("plan", _plan_text(plan))
    except MoeDistError as failed:
        for problem in failed.problems:
            yield error("configuration", problem, "", kind=type(failed))
        return
    config = preflight.config
    here = look(Questions(folder=config.run.root, data=config.data.path), env=env)
    saves = measured_save_seconds(RunFolder.of(config).logs)
    try:
        yield from launcher.examine(Examination(config, plan, site, env, here, saves, probe, fabric))
    except ResourceError as failed:
        yield error("scheduler", str(failed.problems[0]), "")


def _plan_text(plan: JobPlan) -> str:
    kinds = sorted({each for node in plan.nodes for each in [node.feature, *map("=".join, node.labels.items())] if each})
    gpus = f", {plan.gpus_per_node} GPUs each" if plan.gpus_per_node else ""
    wanted = f", with {', '.join(kinds)}" if kinds else ""
    return f"{plan.world_size} ranks on {len(plan.nodes)} node{'s' * (len(plan.nodes) > 1)}{gpus}{wanted}"


@reports_errors()
def main(
    config: ConfigPath,
    overrides: Overrides = None,
    on: Annotated[str, typer.Option(help=f"Launcher of the run: {', '.join(launcher_table())}.")] = "local",
    cluster: ClusterName = None,
    probe: Annotated[bool, typer.Option("--probe", help="Check each node, by a job of at most two minutes.")] = False,
    fabric: Annotated[bool, typer.Option("--fabric", help="Measure every pair of nodes, and name the slow node.")] = False,
) -> None:
    """Check a machine or cluster for a run, and print each check with its fix. The exit code is 0 if all is well, 1 if
    there are warnings, and 78, 69 or 65 if the run would end with that code."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    found: list[CheckResult] = []
    for result in examine(config, overrides or [], on=on, cluster=cluster, probe=probe, fabric=fabric):
        found.append(result)
        mark, style = _MARKS[result.level]
        console.print(Text.assemble((f"{mark:<4}", style), " ", str(result)))
    raise typer.Exit(exit_code(found))


if __name__ == "__main__":
    run_command(main)
