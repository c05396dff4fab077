"""Measures dispatch against its floor and its peers on this machine: python -m tools.bench_dispatch [--json FILE]

Paired and interleaved, one thread a rank; what each table proves, and what it does not, is in docs/benchmarks.md.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_dist.errors import EXIT_FAILED, ConfigError
from moe_dist.runtime.command_line import run_command
from tools.bench.ranks import Job, measure, read_results
from tools.bench.report import draw, markdown, text

DEFAULT_JSON = Path(".cache/bench/dispatch.json")


def main(
    world: Annotated[int, typer.Option(min=2, help="Ranks; at most the cores.")] = 2,
    json: Annotated[
        Path, typer.Option(help="Results; rows that it has are kept, so that an interrupted run goes on.")
    ] = DEFAULT_JSON,
    only: Annotated[list[str], typer.Option(help="A sweep, as 'tokens' or 'layer'; may be repeated.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each row.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of routings and order.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny points, to see that all of it runs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all rows again.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the file's tables; measure nothing.")] = False,
) -> None:
    """Print the rows that are lost, then all; write JSON, and a picture beside it."""
    if not as_markdown:
        cores = len(os.sched_getaffinity(0))
        if world > cores:
            print(f"--world {world}: more ranks than the {cores} cores; their times would say nothing", file=sys.stderr)
            raise typer.Exit(ConfigError.exit_code)
        if fresh:
            json.unlink(missing_ok=True)
        try:
            measure(Job(world, json, tuple(only), quick, rounds, seed))
        except RuntimeError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(EXIT_FAILED) from error
    results = read_results(json)
    print(markdown(results) if as_markdown else text(results))
    if not as_markdown:
        picture = json.with_suffix(".png")
        draw(results, picture)
        print(f"{json}, {picture}")


if __name__ == "__main__":
    run_command(main)
