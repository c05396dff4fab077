"""Submits a run to Slurm: python -m launchers.slurm CONFIG [key=value ...] [--cluster SITE] [--dry-run] [--array SWEEP]

The command plans the nodes, writes the batch script, copies code and configuration into the run folder, and calls sbatch.
"""

import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from launchers.command import TRAIN, JobPlan, ReadRun, absolute_paths, plan_job
from launchers.fit import unmet
from launchers.launcher import ClusterName, ConfigPath, Examination, Launcher, Overrides, Overwrite
from launchers.slurm import checks
from launchers.slurm.job import rank_step
from launchers.slurm.nodes import SlurmError, ask, outside_jobs
from launchers.slurm.script import PROGRAM, output_pattern, parts, script
from launchers.slurm.step import SlurmJob
from launchers.snapshot import CodeSnapshot, code_folder, read_sweep, take_snapshot
from moe_dist.config.cluster import TIME_PATTERN, Cluster, load_cluster
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, ConfigError, MoeDistError, ResourceError
from moe_dist.plan.preflight import check_file, layout_of_file
from moe_dist.runtime.command_line import RUN_FOLDER_FIX, print_done, reports_errors, run_command
from moe_dist.runtime.node.check_result import CheckResult
from moe_dist.runtime.run_folder import RunFolder, Start

# Errors of sbatch about missing nodes; all other errors of sbatch concern account, partition or limits.
_NO_SUCH_NODES = (
    "Invalid feature specification",
    "Requested node configuration is not available",
    "Node count specification invalid",
    "More processors requested than permitted",
)


@dataclass(frozen=True)
class Submission:
    """A job ready for submission.

    Attributes:
        config: Configuration of the run; each task of an array adds its overrides.
        sweep: Overrides of each array task; empty for a single run.
        folder: Run folder; for an array, the parent of all run folders.
        snapshot: Folder for the copy of the code.
        program: Arguments of the ranks' Python interpreter that precede the configuration's path.
    """

    config: Config
    cluster: Cluster
    plan: JobPlan
    sweep: tuple[tuple[str, ...], ...]
    folder: Path
    snapshot: Path
    text: str
    program: tuple[str, ...]


def prepare(
    config_path: Path,
    overrides: Sequence[str],
    cluster: Cluster,
    *,
    sweep: Sequence[Sequence[str]] = (),
    program: Sequence[str] = TRAIN,
    read: ReadRun = check_file,
) -> Submission:
    """Plans a job and renders its script; writes no file. Each array task is a run in `<root>/<name>/<task>`. Raises
    ConfigError or DataError or ResourceError if the run, a task or the nodes are invalid.

    Args:
        program: Arguments of the ranks' interpreter that precede the configuration's path; by default the training.
        read: Reads and checks the run; `layout_of_file` needs no data.
    """
    loaded = read(config_path, overrides).config
    fixed = (*overrides, *absolute_paths(loaded, Path.cwd()))  # absolute, because the job runs in another folder
    layout = read(config_path, fixed)
    config, plan = layout.config, plan_job(layout, cluster)
    folder = Path(config.run.root) / config.run.name
    tasks = _tasks(sweep, folder, plan, lambda task: plan_job(read(config_path, (*fixed, *task)), cluster))
    name = time.strftime("%Y%m%dT%H%M%S-") + os.urandom(3).hex()
    snapshot = folder / "slurm" / name
    output = output_pattern(folder / "slurm", array=bool(tasks))
    exports = {"MOE_DIST_SNAPSHOT": str(snapshot), "MOE_DIST_PYTHON": sys.executable}
    if tuple(program) != TRAIN:
        exports[PROGRAM] = shlex.join(program)
    text = script(plan, cluster, name=config.run.name, output=output, exports=exports)
    return Submission(config, cluster, plan, tasks, folder, snapshot, text, tuple(program))


def submit(job: Submission, options: Sequence[str] = ()) -> str:
    """Writes the snapshot and submits the job with further sbatch `options`; returns Slurm's job id.

    Raises:
        ConfigError: sbatch rejects an option of the cluster file.
        ResourceError: the cluster lacks the nodes of the plan.
        SlurmError: sbatch is missing or does not answer.
    """
    if job.sweep:
        job.folder.mkdir(parents=True, exist_ok=True)
    else:
        RunFolder.of(job.config).prepare()
    job.snapshot.parent.mkdir(exist_ok=True)
    take_snapshot(job.snapshot, job.config, job.cluster, sweep=job.sweep).script.write_text(job.text)
    try:
        return ask(*_sbatch(job, options), cwd=code_folder(), env=outside_jobs(os.environ)).strip().partition(";")[0]
    except SlurmError as error:
        shutil.rmtree(job.snapshot, ignore_errors=True)  # a refused job leaves nothing behind
        raise _refusal(job, str(error)) from error


def _sbatch(job: Submission, options: Sequence[str]) -> list[str]:
    at_once = f"%{job.cluster.array_tasks}" if job.cluster.array_tasks is not None else ""
    array = [f"--array=0-{len(job.sweep) - 1}{at_once}"] if job.sweep else []
    return ["sbatch", "--parsable", *array, *options, str(CodeSnapshot(job.snapshot).script)]


def _tasks(
    sweep: Sequence[Sequence[str]], folder: Path, plan: JobPlan, plan_of: Callable[[Sequence[str]], JobPlan]
) -> tuple[tuple[str, ...], ...]:
    """Returns the overrides of each array task, which also set the run's name. All tasks must need the same nodes."""
    if not sweep:
        return ()
    if len(parts(plan)) > 1:
        raise ConfigError(
            "--array: Slurm has no arrays of heterogeneous jobs, and the groups of this run need several kinds of nodes "
            "(placement.groups.<group>.node); submit each run by itself"
        )
    tasks = []
    for index, line in enumerate(sweep):
        task = (*line, f"run.root={folder}", f"run.name={index}")
        try:
            found = plan_of(task)
        except MoeDistError as error:
            raise type(error)([f"--array, task {index}: {problem}" for problem in error.problems]) from error
        if found.nodes != plan.nodes or found.gpus_per_node != plan.gpus_per_node:
            raise ConfigError(
                f"--array, task {index}: needs other nodes than the base configuration; all tasks of an array get the same "
                "nodes: submit this run by itself"
            )
        tasks.append(task)
    return tuple(tasks)


def _refusal(job: Submission, words: str) -> MoeDistError:
    """Returns the exception for an error of sbatch. For missing nodes, the message names ranks, groups and feature."""
    if not any(each in words for each in _NO_SUCH_NODES):
        return ConfigError(
            f"{words}; account, partition, QOS, time and GPUs come from the cluster file, dependencies from --dependency"
        )
    offers = checks.read_offers(job.cluster.partition)
    wanted, where = checks.wants(job.plan, job.cluster), checks.where_of(job.cluster)
    problems = unmet(wanted, offers, word="feature", where=where)
    return ResourceError(problems or f"the cluster has no such nodes: {words}; the plan is\n{job.plan.table()}")


def main(
    config: ConfigPath,
    overrides: Overrides = None,
    cluster: ClusterName = None,
    limit: Annotated[
        str | None, typer.Option("--time", help="Time limit of one attempt, instead of the cluster file's.")
    ] = None,
    array: Annotated[Path | None, typer.Option(help="Sweep file: one line of key=value for each task.")] = None,
    dependency: Annotated[str | None, typer.Option(help="Condition for the start, as afterok:1234.")] = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print script, srun command and rank table; no data, no submission.")
    ] = False,
    program: Annotated[str, typer.Option(help="Program of the ranks instead of the training, for tests.")] = shlex.join(
        TRAIN
    ),
) -> None:
    """Plan a run for a Slurm cluster, copy its code and configuration into the run folder, and submit it."""
    with reports_errors(storage=RUN_FOLDER_FIX):
        site = load_cluster(cluster, os.environ)
        options = _options(limit, dependency)
        if limit is not None:
            site = site.model_copy(update={"time": limit})
            if broken := list(site.violations()):
                raise ConfigError([f"--time={limit}: {violation.problem}" for violation in broken])
        if array is not None and overwrite:
            raise ConfigError("--overwrite: cannot be combined with --array; rename the folder of the sweep by hand")
        if warning := site.limit_warning():
            print(warning, file=sys.stderr)
        sweep = read_sweep(array) if array is not None else []
        read: ReadRun = layout_of_file if dry_run else check_file
        job = prepare(config, overrides or [], site, sweep=sweep, program=shlex.split(program), read=read)
        if dry_run:
            print_done(f"{job.text}\n{_commands_text(job, options)}")
            print(job.plan.table(), file=sys.stderr)
            raise typer.Exit(EXIT_DONE)
        _submit(job, options, overwrite=overwrite)


def _commands_text(job: Submission, options: Sequence[str]) -> str:
    """Returns the sbatch command, and the first attempt's srun command and rank table. JOB stands for the job's id, and
    NODE0 for the name of the first node."""
    hosts = tuple(f"NODE{node.index}" for node in job.plan.nodes)
    snapshot, first = CodeSnapshot(job.snapshot), SlurmJob("JOB", 0, None, Path.cwd())
    table, text, command = rank_step(first, snapshot, job.config, job.cluster, job.plan, hosts, program=job.program)
    submission = shlex.join(_sbatch(job, options))
    return f"# Submission:\n{submission}\n\n# Each attempt:\n{shlex.join(command)}\n\n# {table}:\n{text}"


def _submit(job: Submission, options: Sequence[str], *, overwrite: bool) -> None:
    """Submits the job, and prints its id and paths. For a finished run, only prints the run's summary."""
    folder, old = RunFolder.of(job.config), None
    if not job.sweep:
        old = folder.move_aside() if overwrite else None
        if folder.inspect(job.config) is Start.FINISHED:
            print(folder.finished_text(job.config))
            return
    try:
        number = submit(job, options)
    except MoeDistError:
        if old is not None:
            folder.put_back(old)  # restore the old run if the job was refused
        raise
    if old is not None:
        print(f"{folder.path} moved to {old}", file=sys.stderr)
    output = f"slurm-{number}_<task>.out" if job.sweep else f"slurm-{number}.out"
    print_done(
        f"job {number}\n"
        f"output    {job.folder / 'slurm' / output}\n"
        f"ranks     {job.folder / ('<task>/log' if job.sweep else 'log')}/rank_<rank>.log\n"
        f"snapshot  {job.snapshot}\n"
        f"{job.plan.table()}"
    )


def _options(limit: str | None, dependency: str | None) -> list[str]:
    if limit is not None and not re.fullmatch(TIME_PATTERN, limit):
        raise ConfigError(f"--time={limit!r}: must be minutes, HH:MM:SS or DAYS-HH:MM:SS")
    if dependency is None:
        return []
    if not re.fullmatch(r"[a-z]+(:[0-9_+]+)*([,?][a-z]+(:[0-9_+]+)*)*", dependency):
        raise ConfigError(f"--dependency={dependency!r}: must have the form afterok:1234, afterany:12:13 or singleton")
    return [f"--dependency={dependency}", "--kill-on-invalid-dep=yes"]


class SlurmLauncher(Launcher):
    """Submits a run to a Slurm cluster, where slurm/train.sbatch starts the ranks."""

    main = staticmethod(main)

    def examine(self, asked: Examination) -> Iterator[CheckResult]:
        from launchers.doctor.probe import examine_cluster

        scheduled = checks.check_slurm(asked.plan, asked.cluster, asked.save_seconds)
        return examine_cluster(asked, scheduled, partial(checks.run_on_nodes, asked))


if __name__ == "__main__":
    run_command(main)
