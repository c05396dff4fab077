"""Runs one attempt of a Slurm job; slurm/train.sbatch calls this module on the node of the batch script.

Plans the run, checks the allocation, starts one task per rank with srun, and records the verdict. Requeues the job if a
stopped run has saved (exit code 75), and after each failure that other launchers would answer with a restart
(launchers/restart.py). After a node failure Slurm itself requeues the job.
"""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

import typer

from launchers.command import PUBLISHED_RENDEZVOUS, TRAIN, JobPlan, LaunchPlan, absolute_paths, plan_job
from launchers.restart import STOPPED, AttemptEnd, committed_step, is_final, why_not_restarted
from launchers.slurm.nodes import Allocation, differences, hosts_of, inside_job, leave_out, ranks_by_task
from launchers.slurm.script import PROGRAM, interpreter, output_pattern, rank_table, sbatch_line, script, srun_command
from launchers.slurm.step import SlurmJob, hold_signals_prefix, name_unconcluded, outcome_of, requeue_job, run_step
from launchers.snapshot import CodeSnapshot, take_snapshot
from launchers.verdict import conclude, say_cause
from moe_dist.config.bundled import find_config
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.json_text import read_json
from moe_dist.config.load import load_config
from moe_dist.config.regular_file import read_regular
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError
from moe_dist.plan.preflight import check, check_file
from moe_dist.runtime.command_line import reports_errors, run_command
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder, Start
from moe_dist.runtime.signals import StopSignals

_MOST_BYTES = 1 << 24  # largest size of a file about a job's attempts


def run_attempt(job: SlurmJob, arguments: Sequence[str], env: dict[str, str]) -> int:
    """Runs one attempt of a job; returns the job's exit code. Raises MoeDistError before any task is started if the run
    or its allocation is invalid.

    Args:
        arguments: Configuration and overrides of `sbatch slurm/train.sbatch`, used only in the job's first attempt. If
            MOE_DIST_SNAPSHOT is set, the snapshot in that folder replaces them.
        env: Environment of the batch script, as `inside_job` returns it.
    """
    snapshot = CodeSnapshot(Path(env["MOE_DIST_SNAPSHOT"])) if env.get("MOE_DIST_SNAPSHOT") else None
    if snapshot:
        cluster, config = snapshot.cluster(), load_config(snapshot.config_yaml, snapshot.overrides_of(job.task))
    else:
        cluster, config = _read_clone(job, arguments, env)
    folder = RunFolder.of(config)
    if folder.inspect(config) is Start.FINISHED:
        print(folder.finished_text(config))
        return EXIT_DONE
    plan = plan_job(check(config), cluster)
    allocation = Allocation.read(env)
    if problems := differences(plan, allocation, cluster.spare_nodes):
        line = sbatch_line(plan, cluster, ["slurm/train.sbatch", *arguments])
        raise ConfigError([*problems, f"this command requests the nodes of the plan:\n    {line}"])
    folder.prepare()  # makes the folder in which srun opens its log files
    snapshot = snapshot or _take_snapshot(job, config, cluster, plan=plan, env=env)
    path, begin = snapshot.folder / f"job_{job.id}.json", committed_step(folder.checkpoints)
    ends = _begin(job, folder, path, begin)
    if ends and (reason := why_not_restarted(ends, cluster.max_restarts)):  # Slurm itself requeued the job
        print(f"job {job.id} is not continued: {reason}", file=sys.stderr)
        return ends[-1].code or EXIT_FAILED
    if warning := cluster.limit_warning(_limit_seconds(env)):
        print(warning, file=sys.stderr)
    faults = snapshot.folder / f"job_{job.id}_faults"  # file with the names of nodes at fault
    faulty = read_regular(faults, most_bytes=_MOST_BYTES).decode().split() if faults.is_file() else []
    hosts = hosts_of(plan, allocation, faulty)
    print(f"attempt {len(ends)} of job {job.id}; run folder {folder.path}\n{plan.table(hosts)}", flush=True)
    program = tuple(shlex.split(env.get(PROGRAM, ""))) or TRAIN
    table, text, command = rank_step(
        job, snapshot, config, cluster, plan, hosts, features=allocation.features, program=program, restarts=len(ends)
    )
    write_atomically(table, text)
    allocated = [host for part in allocation.parts for host in part.hosts]  # the first host runs this script
    places = ranks_by_task(plan, hosts, allocated)
    ranks_of = {host: [*places.get(host, {}).values()] for host in allocated}
    write_atomically(_ranks_file(path, job.restarts), json.dumps(ranks_of))

    def note_stop() -> None:  # read by the next attempt, if Slurm kills this process before the ranks have saved
        with contextlib.suppress(OSError):
            _keep(path, [*ends, AttemptEnd(None, begin, begin, asked=True)])

    with StopSignals():  # Slurm also sends stop signals while the job is requeued
        with StopSignals(note_stop) as signals:
            started, restarts = time.monotonic(), len(ends)
            outcome = outcome_of(*run_step(command, env), places, stopped=signals.first is not None)
            verdict = conclude(folder, job.attempt_id, outcome, restarts=restarts, lasted=time.monotonic() - started)
        print(f"verdict {verdict.code}; logs are in {folder.logs}", file=sys.stderr)
        ends.append(AttemptEnd(verdict.code, begin, committed_step(folder.checkpoints), outcome.stop is not None))
        _keep(path, ends)
        if verdict.code == STOPPED or not is_final(verdict.code):
            requeue_job(job, snapshot, path, why_not_restarted(ends, cluster.max_restarts))
        if verdict.code == EXIT_FAILED and verdict.rank is not None:
            faulty.append(outcome.hosts[verdict.rank])
            with contextlib.suppress(OSError):  # if the disk is full, the next attempt may use the faulty node again
                write_atomically(faults, " ".join(faulty))
            print(leave_out(job.name, faulty, snapshot.script), file=sys.stderr)
    say_cause(folder, job.attempt_id, verdict)
    return verdict.code


def _read_clone(job: SlurmJob, arguments: Sequence[str], env: dict[str, str]) -> tuple[Cluster, Config]:
    """Reads the cluster file and the configuration for `sbatch slurm/train.sbatch`. Makes paths absolute; a relative path
    starts at the folder in which sbatch was called."""
    if not arguments:
        raise ConfigError("sbatch slurm/train.sbatch CONFIG [key=value ...]: CONFIG is missing")
    if job.task is not None:
        raise ConfigError(
            "an array needs a sweep file with the overrides of each task: submit with moe-dist launch slurm CONFIG "
            "--array FILE, not with sbatch --array"
        )
    path, overrides = job.submitted / find_config(arguments[0]), arguments[1:]
    loaded = check_file(path, overrides).config
    cluster = load_cluster(None, env)
    if cluster.cpus_per_rank is None and "SLURM_CPUS_PER_TASK" in env:  # srun does not inherit sbatch --cpus-per-task
        cluster = cluster.model_copy(update={"cpus_per_rank": int(env["SLURM_CPUS_PER_TASK"])})
    return cluster, load_config(path, (*overrides, *absolute_paths(loaded, job.submitted)))


def _take_snapshot(job: SlurmJob, config: Config, cluster: Cluster, *, plan: JobPlan, env: dict[str, str]) -> CodeSnapshot:
    """Copies code and configuration for all attempts of this job. Records the path of the copy in the folder in which
    sbatch was called, because slurm/train.sbatch looks there after a requeue."""
    place = RunFolder.of(config).path / "slurm" / f"job_{job.id}_{os.urandom(3).hex()}"
    place.parent.mkdir(exist_ok=True)
    snapshot = take_snapshot(place, config, cluster, clone=Path.cwd())
    exports = {"MOE_DIST_SNAPSHOT": str(place), "MOE_DIST_PYTHON": sys.executable}
    exports |= {PROGRAM: env[PROGRAM]} if PROGRAM in env else {}
    output = output_pattern(place.parent)
    snapshot.script.write_text(script(plan, cluster, name=config.run.name, output=output, exports=exports))
    pointer = job.submitted / ".moe_dist" / f"job_{env.get('SLURM_CLUSTER_NAME', '')}_{job.id}"
    try:
        pointer.parent.mkdir(exist_ok=True)
        write_atomically(pointer, str(place))
    except OSError as error:
        text = f"{pointer}: {error.strerror}; after a requeue the job will run the current code of the clone"
        print(text, file=sys.stderr)
    return snapshot


def _begin(job: SlurmJob, folder: RunFolder, path: Path, step: int) -> list[AttemptEnd]:
    """Reads the ended attempts of this job from the file `path`, and adds the attempt that begins at `step` to the file."""
    ends = [AttemptEnd(*each) for each in read_json(path, most_bytes=_MOST_BYTES)] if path.is_file() else []
    if ends and ends[-1].code is None:  # Slurm killed the last attempt's batch script before the script called `conclude`
        before = replace(job, restarts=job.restarts - 1)
        ranks_of = _ranks_file(path, before.restarts)
        known = read_json(ranks_of, most_bytes=_MOST_BYTES) if ranks_of.is_file() else {}
        asked = ends[-1].asked
        code = name_unconcluded(folder, before.attempt_id, known, asked=asked, restarts=len(ends) - 1)
        ends[-1] = AttemptEnd(code, ends[-1].begin, step)
    _keep(path, [*ends, AttemptEnd(None, step, step)])
    return ends


def _ranks_file(path: Path, restarts: int) -> Path:
    """Returns the path of the JSON file with the ranks on each host in one attempt. `path` is the file with the job's
    attempts."""
    return path.with_name(f"{path.stem}_{restarts}_ranks.json")


def _keep(path: Path, ends: Sequence[AttemptEnd]) -> None:
    write_atomically(path, json.dumps([astuple(each) for each in ends]))


def _limit_seconds(env: Mapping[str, str]) -> float:
    """Returns the time limit of this attempt in seconds; infinite if Slurm does not tell it (versions before 22.05)."""
    begin, end = (env.get(f"SLURM_JOB_{name}_TIME", "") for name in ("START", "END"))
    return float(int(end) - int(begin)) if begin.isdecimal() and end.isdecimal() else float("inf")


def visible_folders(config: Config, snapshot: CodeSnapshot) -> list[str]:
    """Returns the folders of the node that the ranks use. A container must mount each of them at the same path."""
    weights = config.run.init_from
    begin = [weights] if weights is not None and Path(weights).exists() else []  # only the first attempt needs this folder
    return list(dict.fromkeys([str(RunFolder.of(config).path), str(snapshot.folder), config.data.path, *begin]))


def rank_step(
    job: SlurmJob,
    snapshot: CodeSnapshot,
    config: Config,
    cluster: Cluster,
    plan: JobPlan,
    hosts: tuple[str, ...],
    *,
    features: Mapping[str, str] = MappingProxyType({}),
    program: tuple[str, ...] = TRAIN,
    restarts: int = 0,
) -> tuple[Path, str, list[str]]:
    """Returns the path and text of a rank table for these hosts, and the srun command with this table. Writes no file."""
    launch = LaunchPlan(
        config=snapshot.config_yaml,
        overrides=snapshot.overrides_of(job.task),
        job=plan,
        # Only other programs use MASTER_ADDR; moe_dist's ranks read the address that rank 0 publishes.
        rendezvous={**PUBLISHED_RENDEZVOUS, "MASTER_ADDR": hosts[plan.node_of(0).index]},
        attempt=restarts,
        attempt_id=job.attempt_id,
        grace_seconds=cluster.signal_seconds,
        threads=cluster.cpus_per_rank,
        python=interpreter(cluster),
        program=program,
        hosts=hosts,
    )
    code, logs, visible = snapshot.code, RunFolder.of(config).logs, visible_folders(config, snapshot)
    text = rank_table(launch, cluster, features=features, code=code, logs=logs, visible=visible)
    table = snapshot.folder / f"job_{job.id}_{job.restarts}.sh"
    node_env, hold = code / "slurm" / "node_env.sh", hold_signals_prefix(cluster)
    command = srun_command(plan, cluster, hosts=hosts, table=table, node_env=node_env, visible=visible, hold=hold)
    return table, text, command


def main(
    config: Annotated[str | None, typer.Argument(help="Configuration of the run, a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200.")] = None,
) -> None:
    """Run one attempt of a job that Slurm has started; called by slurm/train.sbatch."""
    with reports_errors(storage="run folder and snapshot must be writable on this node"):
        arguments = [] if config is None else [config, *(overrides or [])]
        env = inside_job(os.environ)
        raise typer.Exit(run_attempt(SlurmJob.from_environment(env), arguments, env))


if __name__ == "__main__":
    run_command(main)
