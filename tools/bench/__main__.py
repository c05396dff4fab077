"""Compares dispatch with its floor and with other implementations on this machine: python -m tools.bench [--json FILE]

Contenders are paired and interleaved, with one thread for each rank. docs/benchmarks.md says what each table proves and
what it does not.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

import moe_dist
from moe_dist.errors import EXIT_FAILED, ConfigError
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.provenance import code_state
from tools.bench.ranks import BenchJob, measure, read_results
from tools.bench.report import draw, markdown, text

DEFAULT_JSON = Path(".cache/bench/dispatch.json")
QUICK_JSON = Path(".cache/bench/quick.json")


@reports_errors()
def main(
    world: Annotated[int, typer.Option(min=2, help="Ranks; at most the cores.")] = 2,
    json: Annotated[
        Path | None, typer.Option(help=f"Results; rows that it has are kept. Default {DEFAULT_JSON}, --quick {QUICK_JSON}.")
    ] = None,
    only: Annotated[list[str], typer.Option(help="A sweep, as 'tokens' or 'layer'; may be repeated.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each row.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Of routings and order.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny points, to see that all of it runs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what the file has; with --only those.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the file's tables; measure nothing.")] = False,
) -> None:
    """Print the rows that are lost, then all; write JSON, and a picture beside it."""
    path = json or (QUICK_JSON if quick else DEFAULT_JSON)
    if not as_markdown:
        cores = len(os.sched_getaffinity(0))
        if world > cores:
            raise ConfigError(f"--world {world}: more ranks than the {cores} cores; their times would say nothing")
        try:
            measure(BenchJob(world, path, tuple(only), quick, rounds, seed, _commit()), fresh=fresh)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(EXIT_FAILED) from error
    results = read_results(path)
    print(markdown(results) if as_markdown else text(results))
    if not as_markdown:
        picture = path.with_suffix(".png")
        draw(results, picture)
        print(f"{path}, {picture}")


def _commit() -> str:
    """Commit of this clone, with a plus if the code differs from it."""
    commit, diff, untracked = code_state(Path(moe_dist.__file__).parent)
    return f"{(commit or 'unknown')[:12]}{'+' if diff or untracked else ''}"


if __name__ == "__main__":
    run_command(main)
