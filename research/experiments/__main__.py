"""Runs an experiment and reports its results: python -m research.experiments NAME [--pilot | --status | --report]

research/configs/reproduce/NAME.yaml has the question, the arms (configurations that are compared) and the rules. See
research/README.md.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from filelock import FileLock, Timeout

from moe_dist.errors import ConfigError
from moe_dist.plan.preflight import check, layout_without_data
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import StopRequest
from research.experiments.claims import PAGE as CLAIMS_PAGE
from research.experiments.claims import write_claims
from research.experiments.heldout import check_validation
from research.experiments.oracle import check_routers
from research.experiments.questions import check_questions
from research.experiments.report import write_report
from research.experiments.results import check_rules, read_records, results_path
from research.experiments.runner import STOP_SECONDS, Runner
from research.experiments.study import FOLDER, ROOT, Study, StudyJob, config_of, find_file, jobs_of, load_study, run_folder
from research.experiments.summary import write_summary
from research.experiments.verdicts import Records, failed_gates, judge_gates


@reports_errors()
def main(
    name: Annotated[str, typer.Argument(help="Name of the experiment: research/configs/reproduce/NAME.yaml.")],
    pilot: Annotated[
        bool, typer.Option("--pilot", help="Run the pilot, on its own seeds; its records are never reported.")
    ] = False,
    only: Annotated[list[str], typer.Option(help="Run only this arm; may be repeated. Arms it needs must be done.")] = [],  # noqa: B006
    status: Annotated[bool, typer.Option("--status", help="Print the state of each run; start nothing.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write tables, plots and verdicts; start nothing.")] = False,
    processes: Annotated[int, typer.Option(min=1, help="Number of simultaneous ranks of runs, one thread each.")] = 2,
) -> None:
    """Run what is missing, then report. Ctrl-C saves and stops; the same command continues."""
    path = find_file(FOLDER / f"{name}.yaml")
    study = load_study(path)
    jobs = jobs_of(study, pilot=pilot)
    labels = {job.label for job in jobs}
    if unknown := sorted(set(only) - labels):
        raise ConfigError(f"--only {', '.join(unknown)}: {study.name} has the arms {', '.join(sorted(labels))}")
    jobs = [job for job in jobs if not only or job.label in only]
    if status:
        print(_status_text(study, jobs, pilot=pilot))
        return
    if not report:
        _run(path, study, jobs, pilot=pilot, processes=processes)
    if not pilot:
        print(write_report(study))
        if CLAIMS_PAGE.is_file():
            write_claims(CLAIMS_PAGE)
            write_summary()


def _status_text(study: Study, jobs: Sequence[StudyJob], *, pilot: bool) -> str:
    """Returns a line for each arm. It has the state of the run with each seed."""
    records = read_records(results_path(study, pilot=pilot))
    by_arm: dict[str, list[str]] = {}
    for job in jobs:
        by_arm.setdefault(job.label, []).append(f"seed {job.seed} {_state(study, job, records, pilot=pilot)}")
    done = sum((job.label, job.seed) in records for job in jobs)
    width = max(map(len, by_arm))
    lines = [f"{name:<{width}}  {', '.join(states)}" for name, states in by_arm.items()]
    return "\n".join([f"{study.name}{' (pilot)' if pilot else ''}: {done} of {len(jobs)} runs done", *lines])


def _state(study: Study, job: StudyJob, records: Records, *, pilot: bool) -> str:
    if (job.label, job.seed) in records:
        record = records[job.label, job.seed]
        return f"done, {record['loss']['all']:.4f} nats at load {record['load']['all']:.3f} in {record['seconds']:.0f} s"
    folder = RunFolder(run_folder(study, job.label, job.seed, pilot=pilot))
    if not folder.path.is_dir():
        return "waits"
    return f"at step {folder.last_step()} of {config_of(study, job, pilot=pilot).train.steps}"


def _run(path: Path, study: Study, jobs: list[StudyJob], *, pilot: bool, processes: int) -> None:
    for job in {job.label: job for job in jobs}.values():
        config = config_of(study, job, pilot=pilot)  # raises if any arm has an error, before the first run starts
        if any(value.metric.endswith("folder") for value in job.arm.measured.values()):
            layout_without_data(config)  # an earlier arm makes the files; the run checks the files
        else:
            check(config)
        choosing = config.model.moe.router.experts_choose or config.model.mixture_of_depths is not None
        if "flip" in job.arm.probes and not choosing:
            problem = f"it swaps choices of experts or layers, and with {config.model.moe.router.name} tokens choose"
            raise ConfigError(f"arms.{job.label}.probes: flip: {problem}; remove it")
        if {"oracle", "disturbed"} & {*job.arm.asks}:
            check_routers(config.model.moe)
    if pilot and jobs:
        check_validation(study.measure, config_of(study, jobs[0], pilot=True))
    if study.measure.questions is not None and jobs:
        asks = {ask for job in jobs for ask in job.arm.asks}
        samples = bool({"samples", "disturbed"} & asks)
        check_questions(study.measure.questions, config_of(study, jobs[0], pilot=pilot), samples=samples)
    results = results_path(study, pilot=pilot)
    rules = None if pilot else check_rules(results, path, study)
    lock = ROOT / f".{study.name}{'-pilot' if pilot else ''}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(lock, timeout=0), StopRequest(STOP_SECONDS) as stop:
            runner = Runner(path, study, pilot, rules, processes, lambda: stop.requested, same_code=study.committed_code)
            if study.gates and not pilot:
                runner.run([job for job in jobs if job.label in study.gate_arms])
                gates = judge_gates(study, read_records(results))
                if any(gate.outcome == "not testable here" for gate in gates):
                    raise ConfigError(f"{failed_gates(gates)}: run the arms of the gates first, without --only")
                if reason := failed_gates(gates):
                    print(f"{reason}; the other arms are not run")
                    return
            runner.run(jobs)
    except Timeout as error:
        raise ConfigError(f"{lock} is held: another process (not {os.getpid()}) runs {study.name}; wait for it") from error


if __name__ == "__main__":
    run_command(main)
