"""One start of a Slurm job, on the node of its batch script: slurm/train.sbatch ends as this.

configuration of the first attempt -> plan -> what Slurm gave -> one task a rank (srun) -> verdict -> requeue, or the end

The job's exit code is the run's verdict, and 75 alone is followed by a requeue: the run was told to stop (time limit,
preemption) and has saved. Where a node dies, Slurm itself requeues the job on the rest.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from launchers.command import TRAIN, JobPlan, Plan, absolute_paths, plan_job, published_rendezvous, rank_commands
from launchers.restart import Ended, committed_step, exhausted
from launchers.slurm_allocation import Allocation, SlurmError, ask, differences, hosts_of
from launchers.slurm_script import PROGRAM, rank_table, sbatch_line, srun_command
from launchers.snapshot import Snapshot, take_snapshot
from launchers.supervise import StopSignals, last_words
from moe_dist.config.cluster import Cluster, load_cluster
from moe_dist.config.load import load_config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError, StoppedError
from moe_dist.preflight import check, check_file
from moe_dist.runtime.command_line import run_command
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.run_folder import RunFolder, Start

STOPPED = StoppedError.exit_code
_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (Exited with exit code (\d+)|.+)")


@dataclass(frozen=True)
class Job:
    """What Slurm says about this start.

    Attributes:
        id: Number of the job; each task of an array has its own.
        restarts: How often Slurm has requeued it.
        task: Of an array; None without.
        submitted: Folder it was submitted from.
    """

    id: str
    restarts: int
    task: int | None
    submitted: Path

    @classmethod
    def from_environment(cls) -> "Job":
        """Reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_ARRAY_TASK_ID and SLURM_SUBMIT_DIR.

        Raises:
            ConfigError: this is no batch script.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError(
                "launchers.slurm_job is the end of slurm/train.sbatch; submit that, or python -m launchers.slurm"
            )
        task = os.environ.get("SLURM_ARRAY_TASK_ID")
        return cls(
            id=os.environ["SLURM_JOB_ID"],
            restarts=int(os.environ.get("SLURM_RESTART_COUNT", "0")),
            task=int(task) if task is not None else None,
            submitted=Path(os.environ.get("SLURM_SUBMIT_DIR", ".")).absolute(),
        )

    @property
    def attempt_id(self) -> str:
        """A name that no other start has."""
        return f"slurm-{re.sub('[^A-Za-z0-9]', '', os.environ.get('SLURM_CLUSTER_NAME', ''))}-{self.id}-{self.restarts}"


def carry_out(job: Job, config_path: Path | None, overrides: Sequence[str], program: tuple[str, ...]) -> int:
    """Everything a start of a job does; returns its exit code.

    Raises:
        MoeDistError: found before any task was started.
    """
    snapshot = _snapshot(job, config_path, overrides)
    cluster, config = snapshot.cluster(), load_config(snapshot.config_yaml, snapshot.overrides_of(job.task))
    folder = RunFolder.of(config)
    if folder.inspect(config) is Start.FINISHED:
        print(folder.read_summary())
        return EXIT_DONE
    plan = plan_job(check(config), cluster)
    allocation = Allocation.read(os.environ)
    if faults := differences(plan, allocation):
        raise ConfigError([*faults, f"ask for them with:\n    {_sbatch_again(plan, cluster, config_path, overrides)}"])
    history = History(snapshot.folder / f"job_{job.id}.json")
    begins = history.begin(committed_step(folder.checkpoints))
    if job.restarts and (no := exhausted(_ended(begins), cluster.max_restarts)):
        print(f"job {job.id} does not go on: {no}", file=sys.stderr)
        return EXIT_FAILED
    hosts = hosts_of(plan, allocation)
    print(
        f"attempt {job.restarts} of job {job.id} on {', '.join(hosts)}; run folder {folder.path}\n{plan.table()}",
        flush=True,
    )

    table = snapshot.folder / f"job_{job.id}_{job.restarts}.sh"
    visible = list(dict.fromkeys([str(folder.path), str(snapshot.folder), config.data.path]))
    rank_plan = Plan(
        config=snapshot.config_yaml,
        overrides=snapshot.overrides_of(job.task),
        job=plan,
        rendezvous={**published_rendezvous(), "MASTER_ADDR": hosts[plan.node_of(0).index]},
        attempt=job.restarts,
        attempt_id=job.attempt_id,
        grace_seconds=cluster.signal_seconds,
        python=cluster.python or ("python3" if cluster.container.kind != "none" else sys.executable),
        program=program,
        hosts=hosts,
    )
    folder.prepare()
    text = rank_table(
        rank_commands(rank_plan),
        cluster,
        hosts=hosts,
        features=allocation.features,
        code=snapshot.code,
        logs=folder.logs,
        visible=visible,
    )
    write_atomically(table, text)
    node_env = snapshot.code / "slurm" / "node_env.sh"
    with StopSignals() as signals:
        code, said = _run(srun_command(plan, cluster, table=table, node_env=node_env, visible=visible))
        code = _conclude(folder, job, code, said, stopped=signals.first is not None)
        if code == STOPPED:
            ended = _ended([*begins, committed_step(folder.checkpoints)])
            _start_again(job, snapshot, exhausted(ended, cluster.max_restarts))
    return code


class History:
    """At which committed step each start of the job began: what it takes to see that they gain nothing.

    Args:
        path: JSON file beside the snapshot.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def begin(self, step: int) -> list[int]:
        """Adds this start; returns all of them, this one last."""
        steps = json.loads(self._path.read_text()) if self._path.is_file() else []
        write_atomically(self._path, json.dumps([*steps, step]))
        return [*steps, step]


def _ended(steps: Sequence[int]) -> list[Ended]:
    """The attempts between these steps; all of them may be followed by another, as far as their verdict goes."""
    return [Ended(STOPPED, begin, end) for begin, end in itertools.pairwise(steps)]


def _snapshot(job: Job, config_path: Path | None, overrides: Sequence[str]) -> Snapshot:
    """That of the submission, or of the first attempt; else takes it now and leaves a pointer for the next attempts."""
    if given := os.environ.get("MOE_DIST_SNAPSHOT"):
        return Snapshot(Path(given))
    if config_path is None:
        raise ConfigError("sbatch slurm/train.sbatch CONFIG [key=value ...]: CONFIG is missing")
    if job.task is not None:
        raise ConfigError(
            "an array needs a sweep file, which says what each of its tasks runs: python -m launchers.slurm CONFIG --array "
            "FILE, not sbatch --array"
        )
    cluster = load_cluster(None, os.environ)
    config_path = job.submitted / config_path
    loaded = check_file(config_path, overrides).config
    config = load_config(config_path, (*overrides, *absolute_paths(loaded, job.submitted)))
    folder = RunFolder.of(config)
    folder.inspect(config)
    folder.prepare()
    place = folder.path / "slurm" / f"job_{job.id}_{os.urandom(3).hex()}"
    place.parent.mkdir(exist_ok=True)
    snapshot = take_snapshot(place, config, cluster, clone=Path.cwd())
    pointer = job.submitted / ".moe_dist" / f"job_{job.id}"
    try:
        pointer.parent.mkdir(exist_ok=True)
        write_atomically(pointer, str(place))
    except OSError as error:
        print(f"{pointer}: {error.strerror}; a requeued job will run the clone as it is by then", file=sys.stderr)
    return snapshot


def _run(command: Sequence[str]) -> tuple[int, list[str]]:
    """Runs srun to its end; its exit code, and its lines about tasks that ended badly, in their order."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    said: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        sys.stderr.write(line)
        sys.stderr.flush()
        if _ENDED.match(line):
            said.append(line.strip())
    code = process.wait()
    return (128 - code if code < 0 else code), said


def _conclude(folder: RunFolder, job: Job, code: int, said: Sequence[str], *, stopped: bool) -> int:
    """The verdict of the run, since srun's own code is another where tasks were killed; shows what the cause said."""
    ending = folder.read_status().of(job.attempt_id)
    killed = said[0] if said and "Exited" not in said[0] else ""  # by a signal: it said nothing, its peers a consequence
    if ending is not None and ending.verdict is not None and not (killed and ending.verdict == EXIT_FAILED):
        if ending.verdict not in (EXIT_DONE, STOPPED) and ending.rank is not None:
            log = folder.log_of(ending.rank)
            print(f"rank {ending.rank} failed first; {log} ends with:\n\n{_words(log, job.attempt_id)}\n", file=sys.stderr)
        print(f"verdict {ending.verdict}: {ending.reason.partition(chr(10))[0]}", file=sys.stderr)
        return ending.verdict
    if stopped:
        print("a stop signal ended the ranks before they could save; what the last checkpoint has is safe", file=sys.stderr)
        return STOPPED
    own = [int(match[4]) for line in said if (match := _ENDED.match(line)) and match[4]]
    verdict = EXIT_FAILED if killed else next(iter(own), code)
    if verdict and said and ending is not None:
        last = max(ending.last_step, committed_step(folder.checkpoints))
        reason = said[0].removeprefix("srun: error: ")
        with contextlib.suppress(OSError, MoeDistError):
            folder.amend_status(job.attempt_id, verdict=verdict, reason=reason, rank=None, last_step=last)
        print(f"verdict {verdict}: {reason}; the ranks' logs are in {folder.logs}", file=sys.stderr)
    return verdict


def _words(log: Path, attempt_id: str) -> str:
    """What a rank said last in this attempt."""
    with contextlib.suppress(OSError):
        return last_words(log, max(0, log.read_bytes().rfind(f"--- attempt {attempt_id}".encode())))
    return "(its log cannot be read)"


def _start_again(job: Job, snapshot: Snapshot, no: str | None) -> None:
    """Requeues the job after 75, unless its attempts are enough, its user has cancelled it, or Slurm was faster."""
    again = f"sbatch {shlex.quote(str(snapshot.folder / 'train.sbatch'))}"
    if no is not None:
        print(f"not requeued: {no}; to go on all the same: {again}", file=sys.stderr)
        return
    try:
        if (state := _state(job)) == "CANCELLED":
            print(f"not requeued: the job was cancelled; to go on: {again}", file=sys.stderr)
            return
        ask("scontrol", "requeue", job.id)
        print("requeued: the next attempt goes on from here", file=sys.stderr)
    except SlurmError as error:
        if (state := _state(job)) in ("PENDING", "REQUEUED", "PREEMPTED", "COMPLETING"):
            print(f"Slurm has requeued the job already ({state})", file=sys.stderr)
            return
        print(f"Slurm refuses to requeue the job: {error}; go on with: {again}", file=sys.stderr)


def _state(job: Job) -> str:
    """The job's state in Slurm's words; empty where Slurm does not say."""
    with contextlib.suppress(SlurmError):
        match = re.search(r"JobState=(\S+)", ask("scontrol", "--oneliner", "show", "job", job.id))
        return match[1] if match else ""
    return ""


def _sbatch_again(plan: JobPlan, cluster: Cluster, config: Path | None, overrides: Sequence[str]) -> str:
    arguments = ["slurm/train.sbatch", *([] if config is None else [str(config)]), *overrides]
    return sbatch_line(plan, cluster, arguments)


def main(
    config: Annotated[Path | None, typer.Argument(help="Configuration of the run, a YAML file.")] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, as train.steps=200.")] = None,
) -> None:
    """Carry out a job that Slurm has started; the end of slurm/train.sbatch."""
    program = tuple(shlex.split(os.environ.get(PROGRAM, ""))) or TRAIN
    try:
        code = carry_out(Job.from_environment(), config, overrides or [], program)
    except MoeDistError as error:
        print(error, file=sys.stderr)
        code = error.exit_code
    except OSError as error:
        print(f"{error}; run folder and snapshot must be writable on this node", file=sys.stderr)
        code = EXIT_FAILED
    sys.exit(code)


if __name__ == "__main__":
    run_command(main)
