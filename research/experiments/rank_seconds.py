"""Times the training steps of a comparison's methods on several ranks, with one thread each.

A trained router has other expert loads than a new router. For each method, the run with the first seed is therefore copied,
and the copy continues for STEPS steps. A round times each method once on each number of ranks, in random order. All rounds
take the same steps. A time is the median over the steps of a round, without the first WARM_UP steps.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE, ConfigError, StoppedError
from moe_dist.monitor.sinks.jsonl import read_lines
from moe_dist.plan.preflight import check
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import child_of
from research.experiments.runner import ONE_THREAD, JobFailedError
from research.experiments.study import Study, StudyJob, config_of, jobs_of, overrides_of, run_folder

ROUNDS, STEPS, WARM_UP = 3, 20, 3
RECORDS = "rank_seconds.jsonl"

Key = tuple[str, int]  # (method, number of ranks)


@dataclass(frozen=True)
class RankTime:
    """The measurements of one method on one number of ranks.

    Attributes:
        seconds: Seconds of a step in each round.
        kilobytes: Kilobytes per token that all ranks send to other ranks in a step, in forward and backward: hidden rows
            and metadata.
    """

    seconds: tuple[float, ...]
    kilobytes: float


def first_jobs(study: Study) -> dict[str, StudyJob]:
    """Maps each method (controls are left out) to its run with the first seed."""
    jobs: dict[str, StudyJob] = {}
    for job in jobs_of(study):
        if not job.arm.measured:
            jobs.setdefault(job.label, job)
    return jobs


def check_ranks(study: Study, ranks: Sequence[int]) -> None:
    """Raises one ConfigError that names all numbers of ranks on which at least one method cannot train."""
    problems = []
    for name, job in first_jobs(study).items():
        for number in ranks:
            try:
                config = load_config(
                    study.base_path, [*overrides_of(study, job, {}, pilot=False), *_layout(study, job, number)]
                )
                check(config, world_size=number)
            except ConfigError as error:
                problems.append(f"--ranks {number}: {name}: {error}")
    if problems:
        raise ConfigError([*problems, "leave these numbers out of --ranks; --ranks '' times no steps"])


def measure(study: Study, ranks: Sequence[int], folder: Path, stop_requested: Callable[[], bool]) -> None:
    """Measures each (round, method, number of ranks) without a record in `folder`, and appends its record.

    Raises:
        StoppedError: a stop was requested; finished rounds are kept.
        JobFailedError: a run failed.
    """
    path, jobs = folder / RECORDS, first_jobs(study)
    done = {(line["round"], line["method"], line["ranks"]) for line in _lines(path)}
    for turn in range(ROUNDS):
        order = [(name, number) for name in jobs for number in ranks]
        random.Random(turn).shuffle(order)
        for name, number in order:
            if (turn, name, number) in done:
                continue
            if stop_requested():
                raise StoppedError("stopped on request; the same command goes on")
            print(f"time {name} on {number} ranks, round {turn + 1} of {ROUNDS}", flush=True)
            with TemporaryDirectory(dir=folder, prefix=".ranks-") as place:
                line = {"round": turn, "method": name, "ranks": number, **_run(study, jobs[name], number, Path(place))}
            with path.open("a") as records:
                records.write(json.dumps(line) + "\n")


def read_rank_times(folder: Path) -> dict[Key, RankTime]:
    """Returns the times of all rounds that were measured so far."""
    lines: dict[Key, list[Mapping[str, Any]]] = {}
    for line in _lines(folder / RECORDS):
        lines.setdefault((line["method"], line["ranks"]), []).append(line)
    return {
        key: RankTime(tuple(each["seconds"] for each in rounds), rounds[0]["kilobytes"]) for key, rounds in lines.items()
    }


def _layout(study: Study, job: StudyJob, ranks: int) -> list[str]:
    batch = config_of(study, job).train.global_batch
    return [f"parallel.ep={ranks}", f"train.micro_batch={max(1, batch // ranks)}"]


def _run(study: Study, job: StudyJob, ranks: int, place: Path) -> dict[str, float]:
    """Continues a copy of the run for STEPS steps. Returns the seconds of a step, and the kilobytes sent per token."""
    finished = RunFolder(run_folder(study, job.label, job.seed, pilot=False))
    copy = RunFolder(place / finished.path.name)
    shutil.copytree(finished.path, copy.path)
    last = finished.read_config().train.steps
    options = [f"run.root={place}", f"train.steps={last + STEPS}", f"checkpoint.every={last + STEPS}"]
    done = subprocess.run(
        [sys.executable, "-m", "launchers.local", str(copy.path / "config.yaml"), *options, *_layout(study, job, ranks)],
        env={**os.environ, **ONE_THREAD},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=child_of(os.getpid(), ignore_stop=False),
    )
    if done.returncode != EXIT_DONE:
        end = (done.stdout + done.stderr)[-2000:]
        raise JobFailedError(f"{job.label} on {ranks} ranks ended with {done.returncode}; finished rounds are kept:\n{end}")
    steps = [line for line in read_lines(copy.metrics_jsonl) if line["kind"] == "step" and line["step"] > last]
    before, timed = steps[WARM_UP - 1], steps[WARM_UP:]
    sent = sum(line["ledger"]["payload_bytes"] + line["ledger"]["metadata_bytes"] for line in timed)
    tokens = timed[-1]["scalars"]["optim/tokens"] - before["scalars"]["optim/tokens"]
    seconds = median(line["scalars"]["perf/step_seconds"] for line in timed)
    return {"seconds": seconds, "kilobytes": sent / tokens / 1e3}


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    return (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else iter(())
