"""Checks a machine or cluster for a run: python -m tools.doctor CONFIG [key=value ...] [--on slurm|ray|local] [--probe]"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from launchers.doctor.examine import examine
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult, Level, exit_code

_MARKS = {
    Level.OK: ("ok", "green"),
    Level.NOTE: ("--", "dim"),
    Level.WARNING: ("WARN", "yellow"),
    Level.ERROR: ("FAIL", "bold red"),
}


@reports_errors()
def main(
    config: Annotated[Path, typer.Argument(help="YAML file of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as in train.steps=200.")] = None,
    on: Annotated[Literal["local", "slurm", "ray"], typer.Option(help="Launcher of the run.")] = "local",
    cluster: Annotated[
        str | None, typer.Option(help="Cluster file, or its name in configs/clusters; by default $MOE_DIST_CLUSTER.")
    ] = None,
    probe: Annotated[bool, typer.Option("--probe", help="Check each node, by a job of at most two minutes.")] = False,
    fabric: Annotated[bool, typer.Option("--fabric", help="Measure every pair of nodes, and name the slow node.")] = False,
) -> None:
    """Check a machine or cluster for a run, and print each check with its fix. The worst result is the exit code: 0 all is
    well, 1 there are warnings, 78, 69 or 65 the run would end with this code."""
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    found: list[CheckResult] = []
    for result in examine(config, overrides or [], on=on, cluster=cluster, probe=probe, fabric=fabric):
        found.append(result)
        mark, style = _MARKS[result.level]
        console.print(Text.assemble((f"{mark:<4}", style), " ", str(result)))
    raise typer.Exit(exit_code(found))


if __name__ == "__main__":
    run_command(main)
