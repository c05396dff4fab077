"""Shows the first step at which the metrics.jsonl of two runs differ. Measured times and measurements of the device are
not compared."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.checkpoint.directory import run_path
from moe_dist.errors import ConfigError, DataError, printable
from moe_dist.monitor.compare import first_difference
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.command_line import reports_errors, run_command

RECORD = "metrics.jsonl"
SHOWN = 20


@reports_errors("compare_runs")
def main(
    first: Annotated[Path, typer.Argument(help="A run folder, or its metrics.jsonl.")],
    second: Annotated[Path, typer.Argument(help="Another run folder, or its metrics.jsonl.")],
    rtol: Annotated[float, typer.Option(min=0.0, help="Relative difference up to which numbers count as equal.")] = 0.0,
    only: Annotated[list[str], typer.Option(help="Compare only keys under this one, as losses; may be repeated.")] = [],  # noqa: B006
) -> None:
    """Find the first step at which two runs differ. Ends with exit code 0 without a difference, and with 1 otherwise."""
    try:
        lines = [read_lines(_record(path)) for path in (first, second)]
        difference, same = first_difference(*lines, rtol=rtol, only=only)
    except ValueError as error:
        raise DataError(str(error)) from error
    if difference is None and not same:
        raise DataError(
            f"{first} and {second}: no line of both can be compared; give two runs with records, or another --only"
        )
    if difference is None:
        print(f"{same} lines, no difference")
        return
    place = f"step {difference.step}, {difference.kind}"
    print(printable(f"first difference: {place}; the {difference.same} lines before it are equal"))
    for key, one, other in difference.keys[:SHOWN]:
        print(printable(f"  {key}: {one!r:.60} and {other!r:.60}"))
    if len(difference.keys) > SHOWN:
        print(f"  and {len(difference.keys) - SHOWN} more keys")
    raise typer.Exit(1)


def _record(path: Path) -> Path:
    path = run_path(path)
    found = path / RECORD if path.is_dir() else path
    if not found.is_file():
        raise ConfigError(f"{found} is not there; give a run folder (runs/<name>) or its {RECORD}")
    return found


if __name__ == "__main__":
    run_command(main)
