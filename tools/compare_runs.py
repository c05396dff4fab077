"""Finds the first step at which the metrics.jsonl of two runs differ, and the difference. Times and devices are ignored."""

from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import ConfigError, DataError
from moe_dist.monitor.compare import Difference, first_difference
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.runtime.command_line import reports_errors, run_command

RECORD = "metrics.jsonl"
SHOWN = 20


@reports_errors("compare_runs")
def main(
    first: Annotated[Path, typer.Argument(help="A run folder, or its metrics.jsonl.")],
    second: Annotated[Path, typer.Argument(help="Another one.")],
    rtol: Annotated[float, typer.Option(min=0.0, help="Numbers this close, relatively, count as equal.")] = 0.0,
    only: Annotated[list[str], typer.Option(help="Look at keys under this one alone, as losses; may be repeated.")] = [],  # noqa: B006
) -> None:
    """Finds the first step at which two runs differ; exit code 0 if there is none, 1 if there is."""
    try:
        paths = [_record(first), _record(second)]
        parting, same = first_difference(read_lines(paths[0]), read_lines(paths[1]), rtol=rtol, only=only)
    except ValueError as error:
        raise DataError(str(error)) from error
    if parting is None:
        print(f"{same} lines, no difference")
        return
    _show(parting)
    raise typer.Exit(1)


def _record(path: Path) -> Path:
    found = path / RECORD if path.is_dir() else path
    if not found.is_file():
        raise ConfigError(f"{found} is not there; give a run folder (runs/<name>) or its {RECORD}")
    return found


def _show(parting: Difference) -> None:
    print(f"first difference: step {parting.step}, {parting.kind}; the {parting.same} lines before it are equal")
    for key, one, other in parting.keys[:SHOWN]:
        print(f"  {key}: {one!r:.60} and {other!r:.60}")
    if len(parting.keys) > SHOWN:
        print(f"  and {len(parting.keys) - SHOWN} more keys")


if __name__ == "__main__":
    run_command(main)
