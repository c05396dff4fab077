"""Runs the jobs of an experiment. At most `side_by_side` ranks run at the same time, each with one thread.

Most jobs have one rank. A job of n ranks counts as n jobs, so that its seconds are not measured on an overloaded machine.
A job with more than `side_by_side` ranks runs alone.

A job is a training by launchers.local, followed by the measurement of its run. A later call skips jobs that have a record.
An unfinished training resumes from its last checkpoint. Child processes end when this process ends, even if it is killed.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moe_dist.errors import EXIT_DONE, ConfigError, DataError, MoeDistError, StoppedError
from moe_dist.runtime.signals import child_of
from research.experiments.code_versions import check_same_code
from research.experiments.results import add_record, check_code, code_of_now, make_header, read_records, results_path
from research.experiments.study import Study, StudyJob, overrides_of, run_folder
from research.experiments.verdicts import Record

MEASURED = "measured.json"
SPENT = ("tokens", "flops", "seconds", "bytes")
TICK_SECONDS = 0.2
STOP_SECONDS = 300.0  # a stopped run is killed after this many seconds
# Each process has one thread, because the runs are small, and several runs share the cores.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


class JobFailedError(MoeDistError):
    """A run or a measurement ended with an error."""


@dataclass
class _Running:
    job: StudyJob
    process: subprocess.Popen[bytes]
    training: bool  # true if the process trains, false if it measures a finished run

    @property
    def ranks(self) -> int:
        return self.job.ranks if self.training else 1


@dataclass
class Runner:
    """Runs jobs until each job has a record."""

    study_path: Path  # the experiment's file, for the measuring process
    study: Study
    pilot: bool  # whether the runs are a pilot, whose runs and records are in separate folders
    rules: str | None  # commit of the rules, which goes into the first line of the records
    side_by_side: int  # largest number of ranks that run at the same time
    stop_requested: Callable[[], bool]
    same_code: bool = False  # whether all records need the same version of the code
    _running: list[_Running] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._path = results_path(self.study, pilot=self.pilot)
        self._header = make_header(self.study_path, self.study, self.rules)
        self._records = read_records(self._path)

    def run(self, jobs: Sequence[StudyJob]) -> None:
        """Runs all jobs without a record, ordered by seed, so that runs to compare are close in time.

        Raises:
            StoppedError: a stop was requested; the running trainings have saved checkpoints.
            JobFailedError: a job failed; all other running trainings have saved checkpoints.
            ConfigError: a job needs a record that none of the `jobs` makes, or the code is not allowed to make records.
        """
        jobs = sorted(jobs, key=lambda job: job.seed)
        try:
            while not self.stop_requested():
                self._reap()
                busy = {(each.job.label, each.job.seed) for each in self._running}
                waiting = [job for job in jobs if (job.label, job.seed) not in self._records.keys() | busy]
                for job in waiting:
                    if self._has_room(job) and not self._lacking(job):
                        self._train(job)
                if not self._running:
                    if waiting:
                        lacking = [f"{job.label} seed {job.seed} needs {', '.join(self._lacking(job))}" for job in waiting]
                        raise ConfigError([*lacking, "--only leaves out what these need: run it first, or without --only"])
                    return
                time.sleep(TICK_SECONDS)
        finally:
            self._stop()
        raise StoppedError("stopped on request; the same command goes on")

    def _has_room(self, job: StudyJob) -> bool:
        return not self._running or sum(each.ranks for each in self._running) + job.ranks <= self.side_by_side

    def _lacking(self, job: StudyJob) -> list[str]:
        """Returns the arms that the job needs but that have no record yet."""
        return [name for name in job.arm.needs if (name, job.seed) not in self._records]

    def _train(self, job: StudyJob) -> None:
        self._check_code()  # before each run, because code may have changed since the command started
        measured = {
            key: _reach(self._records[value.arm, job.seed], value.metric, job) for key, value in job.arm.measured.items()
        }
        overrides = overrides_of(self.study, job, measured, pilot=self.pilot)
        self._launch(job, ["launchers.local", str(self.study.base_path), *overrides], training=True)

    def _check_code(self) -> None:
        if not self.pilot:
            check_code(self.study)
            if self.same_code:
                check_same_code(self.study, self._records)

    def _measure(self, job: StudyJob) -> None:
        before = self._records[job.arm.after, job.seed] if job.arm.carry and job.arm.after else {}
        spent = json.dumps({key: before[key] for key in SPENT if key in before})
        arguments = [str(self.study_path), str(self._folder(job)), ",".join(job.arm.probes), spent]
        arguments += ["--asks", ",".join(job.arm.asks), *(["--pilot"] if self.pilot else [])]
        self._launch(job, ["research.experiments.measure", *arguments], training=False)

    def _launch(self, job: StudyJob, arguments: Sequence[str], *, training: bool) -> None:
        """Starts a module with arguments as a child process. The output of the process goes to a file beside the folder of
        the run."""
        folder = self._folder(job)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                env={**os.environ, **ONE_THREAD},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=child_of(os.getpid(), ignore_stop=False),
            )
        self._running.append(_Running(job, process, training))
        print(f"{'train' if training else 'measure'} {job.label} seed {job.seed}", flush=True)

    def _reap(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is None:
                continue
            self._running.remove(each)
            if code != EXIT_DONE:
                what = "training" if each.training else "measurement"
                raise JobFailedError(
                    f"{each.job.label} seed {each.job.seed}: its {what} ended with {code}; the end of "
                    f"{self._folder(each.job)}.out says why. Mend it and start again: what is finished stays"
                )
            if each.training:
                self._measure(each.job)
            else:
                self._keep(each.job)

    def _keep(self, job: StudyJob) -> None:
        self._check_code()
        measured = json.loads((self._folder(job) / MEASURED).read_text())
        record = {"arm": job.label, "seed": job.seed, "code": code_of_now(), **measured}
        add_record(self._path, self._header, record)
        self._records[job.label, job.seed] = record
        print(f"done {job.label} seed {job.seed}: held-out {measured['loss']['all']:.4f} nats", flush=True)

    def _stop(self) -> None:
        """Makes running jobs save and end. Kills jobs that still run after STOP_SECONDS."""
        for each in self._running:
            each.process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for each in self._running:
            try:
                each.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                each.process.kill()
                each.process.wait()
        self._running.clear()

    def _folder(self, job: StudyJob) -> Path:
        return run_folder(self.study, job.label, job.seed, pilot=self.pilot)


def _reach(record: Record, path: str, job: StudyJob) -> Any:
    """Returns the value at a dotted path in a record."""
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise DataError(f"{job.label} is set by {path} of the record of {record['arm']}, which has no {part!r}")
        found = found[part]
    return found
