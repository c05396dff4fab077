"""Runs the arms, continuing an earlier call: two processes side by side, each with one thread and one rank.

A job is a training by launchers.local, followed by its measurement. A finished job has a record and is not run again; an
unfinished one resumes from its last checkpoint, as every run does. Child processes end with this process, however it ends.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.errors import EXIT_DONE, ConfigError, DataError, MoeDistError, StoppedError
from moe_dist.runtime.signals import child_of
from tools.experiments.results import add_record, code_of_now, read_records
from tools.experiments.study import Study, StudyJob, overrides_of, run_folder
from tools.experiments.verdicts import Record

MEASURED = "measured.json"
SPENT = ("tokens", "flops", "seconds")
TICK_SECONDS = 0.2
STOP_SECONDS = 300.0  # a stopped run saves before it ends
# Limit each process to one thread: the runs are small, and two of them fill two cores.
ONE_THREAD = {name: "1" for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
Say = Callable[[str], None]


class JobFailedError(MoeDistError):
    """A run or its measurement ended with an error."""


@dataclass
class _Running:
    job: StudyJob
    process: subprocess.Popen[bytes]
    training: bool  # else it is being measured
    began: float


class Runner:
    """Runs jobs until all have a record.

    Args:
        study_path: The experiment's file, for the measuring process.
        pilot: Selects where runs and records are written.
        path, header: Of the records.
        side_by_side: Number of simultaneous processes.
        stop_requested: Whether to save and stop.
        say: Called with a message at each step.
    """

    def __init__(
        self,
        study_path: Path,
        study: Study,
        *,
        pilot: bool,
        path: Path,
        header: Mapping[str, Any],
        side_by_side: int,
        stop_requested: Callable[[], bool],
        say: Say,
    ) -> None:
        self._study_path, self._study, self._pilot = study_path, study, pilot
        self._path, self._header, self._side_by_side = path, header, side_by_side
        self._stop_requested, self._say = stop_requested, say
        self._running: list[_Running] = []
        self._records = read_records(path)

    def run(self, jobs: Sequence[StudyJob]) -> None:
        """Runs all jobs that have no record yet.

        Raises:
            StoppedError: on request; runs have saved.
            JobFailedError: a job failed; others have saved.
            ConfigError: a job needs a record that no job here makes.
        """
        try:
            while not self._stop_requested():
                self._reap()
                waiting = self._waiting(jobs)
                self._start(waiting)
                if not self._running:
                    if waiting:
                        self._explain(waiting)
                    return
                time.sleep(TICK_SECONDS)
        finally:
            self._stop()
        raise StoppedError("stopped on request; the same command goes on")

    def _waiting(self, jobs: Sequence[StudyJob]) -> list[StudyJob]:
        busy = {(each.job.label, each.job.seed) for each in self._running}
        return [job for job in jobs if (job.label, job.seed) not in self._records.keys() | busy]

    def _start(self, waiting: Sequence[StudyJob]) -> None:
        for job in waiting:
            if len(self._running) >= self._side_by_side:
                return
            if all((name, job.seed) in self._records for name in job.arm.needs):
                self._train(job)

    def _train(self, job: StudyJob) -> None:
        measured = {
            key: _reach(self._records[value.arm, job.seed], value.metric, job) for key, value in job.arm.measured.items()
        }
        overrides = overrides_of(self._study, job, measured, pilot=self._pilot)
        command = [sys.executable, "-m", "launchers.local", self._study.base, *overrides]
        self._launch(job, command, training=True)

    def _measure(self, job: StudyJob) -> None:
        command = [sys.executable, "-m", "tools.experiments.measure", str(self._study_path), str(self._folder(job))]
        before = self._records[job.arm.after, job.seed] if job.arm.carry and job.arm.after else {}
        spent = json.dumps({key: before[key] for key in SPENT if key in before})
        command += [",".join(job.arm.probes), spent, "--asks", ",".join(job.arm.asks)]
        self._launch(job, [*command, "--pilot"] if self._pilot else command, training=False)

    def _launch(self, job: StudyJob, command: Sequence[str], *, training: bool) -> None:
        folder = self._folder(job)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent / f"{folder.name}.out").open("ab") as out:
            process = subprocess.Popen(
                command,
                env={**os.environ, **ONE_THREAD},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=child_of(os.getpid(), ignore_stop=False),
            )
        self._running.append(_Running(job, process, training, time.monotonic()))
        self._say(f"{'train' if training else 'measure'} {job.label} seed {job.seed}")

    def _reap(self) -> None:
        for each in list(self._running):
            code = each.process.poll()
            if code is None:
                continue
            self._running.remove(each)
            if code != EXIT_DONE:
                raise self._failure(each, code)
            if each.training:
                self._measure(each.job)
            else:
                self._keep(each.job)

    def _keep(self, job: StudyJob) -> None:
        measured = json.loads((self._folder(job) / MEASURED).read_text())
        record = {"arm": job.label, "seed": job.seed, "code": code_of_now(), **measured}
        add_record(self._path, self._header, record)
        self._records[job.label, job.seed] = record
        self._say(f"done {job.label} seed {job.seed}: held-out {measured['loss']['all']:.4f} nats")

    def _stop(self) -> None:
        """Asks running jobs to save and end, and waits; kills those that do not."""
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

    def _failure(self, each: _Running, code: int) -> JobFailedError:
        log = self._folder(each.job).parent / f"{self._folder(each.job).name}.out"
        what = "training" if each.training else "measurement"
        return JobFailedError(
            f"{each.job.label} seed {each.job.seed}: its {what} ended with {code}; the end of {log} says why. Mend it and "
            "start again: what is finished stays"
        )

    def _explain(self, waiting: Sequence[StudyJob]) -> None:
        lacking = [
            f"{job.label} seed {job.seed} needs {', '.join(n for n in job.arm.needs if (n, job.seed) not in self._records)}"
            for job in waiting
        ]
        raise ConfigError([*lacking, "--only leaves out what these need: run it first, or without --only"])

    def _folder(self, job: StudyJob) -> Path:
        return run_folder(self._study, job.label, job.seed, pilot=self._pilot)


def _reach(record: Record, path: str, job: StudyJob) -> Any:
    found: Any = record
    for part in path.split("."):
        if not isinstance(found, Mapping) or part not in found:
            raise DataError(f"{job.label} is set by {path} of the record of {record['arm']}, which has no {part!r}")
        found = found[part]
    return found
