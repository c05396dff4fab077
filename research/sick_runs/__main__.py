"""`python -m research.sick_runs` runs the cases that have no record yet, then writes the table."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import print_done, reports_errors, run_command
from moe_dist.runtime.files import write_atomically
from research.sick_runs.attempt import judge
from research.sick_runs.cases import cases
from research.sick_runs.page import page

RECORDS = Path("research/records/sick_runs")
OUT = Path(".cache/sick_runs")


@reports_errors("sick_runs")
def main(
    case: Annotated[list[str] | None, typer.Option(help="Case such as dropout-moe_dist; all if absent.")] = None,
    records: Annotated[Path, typer.Option(help="Folder of a JSON file for each case, and of the table.")] = RECORDS,
    out: Annotated[Path, typer.Option(help="Folder of the runs.")] = OUT,
    through: Annotated[str, typer.Option(help="Program that runs each case, such as one that waits for a slot.")] = "",
    part: Annotated[int, typer.Option(help="With `--of N`: only every Nth case, from this one.")] = 0,
    of: Annotated[int, typer.Option(help="Parts that run beside each other.")] = 1,
    run: Annotated[bool, typer.Option(help="--no-run only writes the table.")] = True,
    again: Annotated[bool, typer.Option(help="Run cases that have a record.")] = False,
) -> None:
    """Run each case, and write the table."""
    known, records, out = {each.key: each for each in cases()}, records.absolute(), out.absolute()
    if unknown := set(case or ()) - known.keys():
        raise ConfigError(f"--case {min(unknown)}: no such case; there are {', '.join(known)}")
    records.mkdir(parents=True, exist_ok=True)
    for key in (case or list(known)[part::of]) if run else []:
        file = records / f"{key}.json"
        if file.exists() and not again:
            continue
        if through:
            words = ["--case", key, "--records", str(records), "--out", str(out), *(["--again"] if again else [])]
            subprocess.run([through, sys.executable, "-m", "research.sick_runs", *words], check=False)
            continue
        result = judge(known[key], out)
        write_atomically(file, json.dumps(result, indent=1) + "\n")
        print_done(f"{key}: exit {result['exit']}, {result.get('verdict', len(result['console']))}")
    write_atomically(records / "README.md", page(list(known.values()), records))


if __name__ == "__main__":
    run_command(main)
