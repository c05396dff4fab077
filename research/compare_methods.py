"""Trains several routing methods at the same mean number of true experts per token, and compares them:

python -m research.compare_methods --budget 1.5 --methods adamoe,longcat,top_p,remoe,expert_choice,fixed

Each method is trained with each seed. With --rates, each method first has one pilot run with each learning rate in --rates,
and then takes its best learning rate. The folder runs/compare/NAME gets study.yaml (all settings), the records
NAME.jsonl.gz, table.md and figure.svg. After a stop, the same command keeps finished runs and makes the missing runs.
"""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from filelock import FileLock, Timeout

from moe_dist.config.yaml_text import load_yaml
from moe_dist.errors import ConfigError
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.signals import StopRequest
from research.experiments.code_versions import check_same_code
from research.experiments.comparison import Comparison, make_study, write_comparison
from research.experiments.methods import METHODS
from research.experiments.rank_seconds import measure
from research.experiments.rate_search import FILE, best_rates, make_search
from research.experiments.results import read_records, results_path
from research.experiments.runner import STOP_SECONDS, Runner
from research.experiments.study import Study, jobs_of

ROOT = Path("runs/compare")
DEFAULT = "fixed,adamoe,longcat,top_p,remoe,dynmoe,predicted_k,expert_threshold,expert_choice"


@reports_errors()
def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides of the base, for all methods.")] = None,
    budget: Annotated[float, typer.Option(min=0.01, help="Mean number of true experts per token, in each group.")] = 1.5,
    methods: Annotated[str, typer.Option(help=f"Methods, separated by commas: {', '.join(METHODS)}.")] = DEFAULT,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; each method has a run with each.")] = "1,2,3",
    base: Annotated[str, typer.Option(help="Configuration of what all methods share.")] = "configs/compare/base.yaml",
    name: Annotated[str, typer.Option(help="Name of the comparison's folder; by default from the budget.")] = "",
    root: Annotated[Path, typer.Option(help="Folder of all comparisons.")] = ROOT,
    processes: Annotated[int, typer.Option(min=1, help="Number of simultaneous runs, one thread each.")] = 2,
    ranks: Annotated[
        str, typer.Option(help="Numbers of ranks (EP sizes) on which steps are timed after training; '' times none.")
    ] = "1,2,4",
    rates: Annotated[
        str, typer.Option(help="Learning rates, separated by commas, of which each method gets its best by a pilot run.")
    ] = "",
    controls: Annotated[
        bool, typer.Option("--controls", help="Train each method's loads of text and image without its choice, too.")
    ] = False,
    hold: Annotated[
        bool,
        typer.Option("--hold", help="After training, set each method's load to the budget on validation sequences."),
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Write table and figure of the runs so far; start none.")
    ] = False,
) -> None:
    """Compare routing methods at one number of experts per token. Ctrl-C saves and stops; the same command continues."""
    asked = Comparison(
        name=name or f"budget-{budget:g}",
        budget=budget,
        methods=tuple(each for each in methods.split(",") if each),
        seeds=_numbers(seeds, "--seeds"),
        base=base,
        overrides=_values(overrides or []),
        root=root,
        ranks=_numbers(ranks, "--ranks"),
        rates=_rates(rates),
        controls=controls,
        hold=hold,
    )
    search = make_search(asked) if asked.rates else None
    if report:
        study = make_study(asked, _found(asked, search))
    else:
        asked.folder.mkdir(parents=True, exist_ok=True)
        lock = asked.folder / ".lock"
        try:
            with FileLock(lock, timeout=0), StopRequest(STOP_SECONDS) as stop:
                study = _run(asked, search, processes, lambda: stop.requested)
        except Timeout as error:
            raise ConfigError(f"{lock} is held: another process (not {os.getpid()}) runs it; wait for it") from error
    print(write_comparison(asked, study, read_records(results_path(study, pilot=False))))
    print(f"table and figure: {asked.folder}/table.md, figure.svg")


def _run(asked: Comparison, search: Study | None, processes: int, stop_requested: Callable[[], bool]) -> Study:
    """Makes the missing runs: first the search of learning rates, then the methods, then the timed steps."""
    if search is not None:
        check_same_code(search, read_records(results_path(search, pilot=True)), pilot=True)
        Runner(asked.folder / FILE, search, True, None, processes, stop_requested).run(jobs_of(search, pilot=True))
    study = make_study(asked, _found(asked, search))
    Runner(asked.study_path, study, False, None, processes, stop_requested, same_code=True).run(jobs_of(study))
    check_same_code(study, read_records(results_path(study, pilot=False)))
    measure(study, asked.ranks, asked.folder, stop_requested)
    return study


def _found(asked: Comparison, search: Study | None) -> dict[str, float]:
    return {} if search is None else best_rates(asked, read_records(results_path(search, pilot=True)))


def _rates(text: str) -> tuple[float, ...]:
    try:
        rates = tuple(float(each) for each in text.split(",") if each)
    except ValueError as error:
        raise ConfigError(f"--rates {text}: give numbers, separated by commas, as in 1e-3,3e-3") from error
    if len(set(rates)) < len(rates) or len(rates) == 1 or not all(0.0 < rate < math.inf for rate in rates):
        raise ConfigError(
            f"--rates {text}: give two positive rates at least, each once; optimizer.lr=RATE sets one for all methods"
        )
    return rates


def _numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(",") if each)
    except ValueError as error:
        raise ConfigError(f"{option} {text}: give whole numbers, separated by commas, as in 1,2,3") from error


def _values(overrides: list[str]) -> dict[str, Any]:
    found = {}
    for each in overrides:
        key, mark, text = each.partition("=")
        if not mark:
            raise ConfigError(f"{each}: an override has the form key=value")
        values, problems = load_yaml(f"value: {text}")
        if problems:
            raise ConfigError([f"{each}: {problem}" for problem in problems])
        found[key] = json.loads(json.dumps(values))["value"]
    return found


if __name__ == "__main__":
    run_command(main)
