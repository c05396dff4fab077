"""One start of a Slurm job, on the node of its batch script: slurm/train.sbatch ends as this.

configuration of the first attempt -> plan -> what Slurm gave -> one task a rank (srun) -> verdict -> requeue, or the end

The job's exit code is the run's verdict, and 75 alone is followed by a requeue: the run was told to stop (time limit,
preemption) and has saved. Where a node dies, Slurm itself requeues the job on the rest.
"""

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from launchers.command import TRAIN, JobPlan, LaunchPlan, absolute_paths, plan_job, published_rendezvous, rank_commands
from launchers.restart import Ended, committed_step, exhausted
from launchers.slurm.allocation import Allocation, differences, hosts_of
from launchers.slurm.script import PROGRAM, interpreter, output_pattern, rank_table, sbatch_line, script, srun_command
from launchers.slurm.step import STOPPED, SlurmJob, conclude, held, run_step, start_again
from launchers.snapshot import Snapshot, take_snapshot
from launchers.supervise import StopSignals
from moe_dist.config.bundled import find_config
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.load import load_config
from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError
from moe_dist.plan.preflight import check, check_file
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder, Start


def carry_out(job: SlurmJob, arguments: Sequence[str], env: dict[str, str]) -> int:
    """Everything that a start of a job does; returns its exit code.

    Args:
        arguments: Configuration and overrides, for the first attempt after a plain sbatch; all others have a snapshot.
        env: Of the batch script.

    Raises:
        MoeDistError: found before any task was started.
    """
    snapshot = Snapshot(Path(env["MOE_DIST_SNAPSHOT"])) if env.get("MOE_DIST_SNAPSHOT") else None
    cluster, config = _read_snapshot(job, snapshot) if snapshot else _read_clone(job, arguments, env)
    folder = RunFolder.of(config)
    if folder.inspect(config) is Start.FINISHED:
        print(folder.read_summary())
        return EXIT_DONE
    plan = plan_job(check(config), cluster)
    allocation = Allocation.read(env)
    if problems := differences(plan, allocation):
        line = sbatch_line(plan, cluster, ["slurm/train.sbatch", *arguments])
        raise ConfigError([*problems, f"the line that asks for what the plan needs:\n    {line}"])
    folder.prepare()
    snapshot = snapshot or _take_snapshot(job, config, cluster, plan=plan, env=env)
    begins = _begin(snapshot.folder / f"job_{job.id}.json", committed_step(folder.checkpoints))
    if job.restarts and (no := _enough(begins, cluster)):
        print(f"job {job.id} does not go on: {no}", file=sys.stderr)
        return EXIT_FAILED
    hosts = hosts_of(plan, allocation)
    print(f"attempt {job.restarts} of job {job.id}; run folder {folder.path}\n{plan.table(hosts)}", flush=True)
    command = _step(job, snapshot, config, cluster, plan=plan, allocation=allocation, program=_program(env))
    with StopSignals() as signals:
        code, ended = run_step(command)
        ranks_of = {hosts[node.index]: node.ranks for node in plan.nodes}
        verdict = conclude(folder, job, code, ended, stopped=signals.first is not None, ranks_of=ranks_of)
        if verdict == STOPPED:
            start_again(job, snapshot, _enough([*begins, committed_step(folder.checkpoints)], cluster))
    return verdict


def _read_snapshot(job: SlurmJob, snapshot: Snapshot) -> tuple[Cluster, Config]:
    return snapshot.cluster(), load_config(snapshot.config_yaml, snapshot.overrides_of(job.task))


def _read_clone(job: SlurmJob, arguments: Sequence[str], env: dict[str, str]) -> tuple[Cluster, Config]:
    """Cluster file and configuration of the first attempt after a plain sbatch; paths are from where that was typed."""
    if not arguments:
        raise ConfigError("sbatch slurm/train.sbatch CONFIG [key=value ...]: CONFIG is missing")
    if job.task is not None:
        raise ConfigError(
            "an array needs a sweep file, which says what each of its tasks runs: moe-dist launch slurm CONFIG --array "
            "FILE, not sbatch --array"
        )
    path, overrides = job.submitted / find_config(arguments[0]), arguments[1:]
    loaded = check_file(path, overrides).config
    return load_cluster(None, env), load_config(path, (*overrides, *absolute_paths(loaded, job.submitted)))


def _take_snapshot(job: SlurmJob, config: Config, cluster: Cluster, *, plan: JobPlan, env: dict[str, str]) -> Snapshot:
    """What this attempt and all further ones run, and a pointer to it in the folder that the job was submitted from."""
    place = RunFolder.of(config).path / "slurm" / f"job_{job.id}_{os.urandom(3).hex()}"
    place.parent.mkdir(exist_ok=True)
    snapshot = take_snapshot(place, config, cluster, clone=Path.cwd())
    exports = {"MOE_DIST_SNAPSHOT": str(place), "MOE_DIST_PYTHON": sys.executable}
    exports |= {PROGRAM: env[PROGRAM]} if PROGRAM in env else {}
    output = output_pattern(place.parent)
    snapshot.script.write_text(script(plan, cluster, name=config.run.name, output=output, exports=exports))
    pointer = job.submitted / ".moe_dist" / f"job_{job.id}"
    try:
        pointer.parent.mkdir(exist_ok=True)
        write_atomically(pointer, str(place))
    except OSError as error:
        print(f"{pointer}: {error.strerror}; a requeued job will run the clone as it is by then", file=sys.stderr)
    return snapshot


def _begin(path: Path, step: int) -> list[int]:
    """Adds this start to the steps at which each start of the job began: what it takes to see that they gain nothing."""
    steps = json.loads(path.read_text()) if path.is_file() else []
    write_atomically(path, json.dumps([*steps, step]))
    return [*steps, step]


def _enough(steps: Sequence[int], cluster: Cluster) -> str | None:
    """Why the attempts between these steps are not followed by another; whether their verdicts allow one is not asked."""
    attempts = [Ended(STOPPED, begin, end) for begin, end in itertools.pairwise(steps)]
    return exhausted(attempts, cluster.max_restarts)


def _program(env: dict[str, str]) -> tuple[str, ...]:
    return tuple(shlex.split(env.get(PROGRAM, ""))) or TRAIN


def visible_folders(config: Config, snapshot: Snapshot) -> list[str]:
    """What a container must see under its own name. Weights to begin with may be gone by the time a run goes on."""
    begin = [config.run.init_from] if config.run.init_from is not None and Path(config.run.init_from).exists() else []
    return list(dict.fromkeys([str(RunFolder.of(config).path), str(snapshot.folder), config.data.path, *begin]))


def _step(
    job: SlurmJob,
    snapshot: Snapshot,
    config: Config,
    cluster: Cluster,
    *,
    plan: JobPlan,
    allocation: Allocation,
    program: tuple[str, ...],
) -> list[str]:
    """Writes the table of this attempt's ranks, and returns the srun that reads it."""
    folder, hosts = RunFolder.of(config), hosts_of(plan, allocation)
    rank_plan = LaunchPlan(
        config=snapshot.config_yaml,
        overrides=snapshot.overrides_of(job.task),
        job=plan,
        # MASTER_ADDR is for programs of others: our ranks meet where rank 0 publishes.
        rendezvous={**published_rendezvous(), "MASTER_ADDR": hosts[plan.node_of(0).index]},
        attempt=job.restarts,
        attempt_id=job.attempt_id,
        grace_seconds=cluster.signal_seconds,
        python=interpreter(cluster),
        program=program,
        hosts=hosts,
    )
    visible = visible_folders(config, snapshot)
    text = rank_table(
        rank_commands(rank_plan),
        cluster,
        hosts=hosts,
        features=allocation.features,
        code=snapshot.code,
        logs=folder.logs,
        visible=visible,
    )
    table = snapshot.folder / f"job_{job.id}_{job.restarts}.sh"
    write_atomically(table, text)
    node_env = snapshot.code / "slurm" / "node_env.sh"
    return srun_command(plan, cluster, table=table, node_env=node_env, visible=visible, hold=held(cluster))


def main(
    config: Annotated[str | None, typer.Argument(help="Configuration of the run, a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200.")] = None,
) -> None:
    """Carry out a job that Slurm has started; the end of slurm/train.sbatch."""
    try:
        arguments = [] if config is None else [config, *(overrides or [])]
        code = carry_out(SlurmJob.from_environment(), arguments, dict(os.environ))
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"{error}; run folder and snapshot must be writable on this node", file=sys.stderr)
        code = EXIT_FAILED
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
