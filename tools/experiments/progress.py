"""Shows which parts of an experiment are done, in progress and missing."""

from collections.abc import Sequence

from moe_dist.runtime.run_folder import RunFolder
from tools.experiments.results import read_records, results_path
from tools.experiments.study import Study, StudyJob, config_of, run_folder
from tools.experiments.verdicts import Records


def status_text(study: Study, jobs: Sequence[StudyJob], *, pilot: bool) -> str:
    """A line for each arm with the state of each seed."""
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
