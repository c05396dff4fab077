"""Compares dispatch with a floor (plain all-to-alls) and with other implementations on this machine:

python -m research.bench [--json FILE]

Contenders (implementations) run in turn, with one thread on each rank. docs/benchmarks.md explains the tables and their
limits.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

import moe_dist
from moe_dist.errors import EXIT_FAILED, ConfigError
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.provenance import code_state
from research.bench.ranks import BenchJob, measure, read_results
from research.bench.report import draw, markdown, text

DEFAULT_JSON = Path(".cache/bench/dispatch.json")
QUICK_JSON = Path(".cache/bench/quick.json")


@reports_errors()
def main(
    world: Annotated[int, typer.Option(min=2, help="Number of ranks, at most the number of cores.")] = 2,
    json: Annotated[
        Path | None,
        typer.Option(help=f"File of results; its rows are kept. Default {DEFAULT_JSON}, with --quick {QUICK_JSON}."),
    ] = None,
    only: Annotated[list[str], typer.Option(help="Sweep to measure, as tokens or layer; may be repeated.")] = [],  # noqa: B006
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of each row.")] = 20,
    seed: Annotated[int, typer.Option(min=0, help="Seed of routings and of the order of contenders.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Use tiny points, which only show that everything runs.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure all rows again; with --only its sweeps.")] = False,
    count: Annotated[
        Path | None, typer.Option(help="Count kernels, syncs and collectives of this configuration's step; needs no GPU.")
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of ranks of --count.")] = 8,
    card: Annotated[str | None, typer.Option(help="Add the time of --count by this card's data sheet, as H100.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value of --count.")] = None,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the file's tables; measure nothing.")] = False,
) -> None:
    """Measure the contenders. Print broken rules, then all rows. Write a JSON file, and a picture beside it."""
    if count is not None:
        from research.bench.counted_step import report  # imports torch

        Console(width=None if Console().is_terminal else 160).print(
            *report(count, ranks, overrides or (), card=card), sep="\n"
        )
        return
    if overrides:
        raise ConfigError(f"{overrides[0]}: only --count takes key=value; to measure one sweep, take --only SWEEP")
    path = json or (QUICK_JSON if quick else DEFAULT_JSON)
    if as_markdown:
        print(markdown(read_results(path)))
        return
    if world > (cores := len(os.sched_getaffinity(0))):
        raise ConfigError(f"--world {world}: more ranks than the {cores} cores; their times would say nothing")
    commit, diff, untracked = code_state(Path(moe_dist.__file__).parent)
    code = f"{(commit or 'unknown')[:12]}{'+' if diff or untracked else ''}"  # "+" if the code differs from the commit
    try:
        measure(BenchJob(world, path, tuple(only), quick, rounds, seed, code), fresh=fresh)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(EXIT_FAILED) from error
    results, picture = read_results(path), path.with_suffix(".png")
    print(text(results))
    draw(results, picture)
    print(f"{path}, {picture}")


if __name__ == "__main__":
    run_command(main)
