"""Runs the srun step of a Slurm job, determines its verdict (the exit code on record), and requeues the job."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.attempts import last_output
from launchers.restart import committed_step
from launchers.slurm.nodes import SlurmError, ask
from launchers.slurm.script import HOLD_SIGNALS
from launchers.snapshot import CodeSnapshot
from moe_dist.config.cluster import Cluster, PyxisContainer
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError, StoppedError
from moe_dist.runtime.run_folder import RunFolder

STOPPED = StoppedError.exit_code
_ENDED = re.compile(r"srun: error: (?:(\S+): tasks? [\d,-]+: (?:Exited with exit code (\d+)|.+)|Node failure on \S+)")


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job in which this process runs.

    Attributes:
        id: Job id; each array task has its own id.
        restarts: Number of times that Slurm has requeued the job.
        task: Number of the array task; None if the job is no array.
        submitted: Folder in which sbatch was called.
    """

    id: str
    restarts: int
    task: int | None
    submitted: Path

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "SlurmJob":
        """Reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_ARRAY_TASK_ID and SLURM_SUBMIT_DIR. Raises ConfigError outside a
        Slurm job."""
        if "SLURM_JOB_ID" not in env:
            raise ConfigError(
                "SLURM_JOB_ID is not set: this command runs inside a Slurm job; submit slurm/train.sbatch, or use "
                "moe-dist launch slurm CONFIG"
            )
        task = env.get("SLURM_ARRAY_TASK_ID")
        return cls(
            id=env["SLURM_JOB_ID"],
            restarts=int(env.get("SLURM_RESTART_COUNT", "0")),
            task=int(task) if task is not None else None,
            submitted=Path(env.get("SLURM_SUBMIT_DIR", ".")).absolute(),
        )

    @property
    def attempt_id(self) -> str:
        """A unique name of this attempt."""
        return f"slurm-{re.sub('[^A-Za-z0-9]', '', os.environ.get('SLURM_CLUSTER_NAME', ''))}-{self.id}-{self.restarts}"

    def state(self) -> str:
        """Slurm's state of the job, such as RUNNING; empty if Slurm does not answer."""
        with contextlib.suppress(SlurmError):
            match = re.search(r"JobState=(\S+)", ask("scontrol", "--oneliner", "show", "job", self.id))
            return match[1] if match else ""
        return ""


def hold_signals_prefix(cluster: Cluster) -> tuple[str, ...]:
    """Command prefix that blocks the stop signals; empty if this node's `env` lacks --block-signal (coreutils before 8.31,
    for example on RHEL 8). Without the prefix, a signal before a rank has its handlers kills that rank without a save."""
    if isinstance(cluster.container, PyxisContainer):  # the container's own `env` cannot be tested from here
        return HOLD_SIGNALS
    supported = subprocess.run([*HOLD_SIGNALS, "true"], capture_output=True, check=False).returncode == 0
    return HOLD_SIGNALS if supported else ()


def run_step(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Runs srun to its end. Returns its exit code, and its error lines about failed tasks, in order. `conclude` prints the
    error lines after the failed rank's own output. Standard output goes to the job's file."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=env
    )
    ended: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        if _ENDED.match(line):
            ended.append(line.strip())
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    code = process.wait()
    return (128 - code if code < 0 else code), ended  # a shell reports signal N as exit code 128 + N


def conclude(
    folder: RunFolder,
    job: SlurmJob,
    code: int,
    ended: Sequence[str],
    *,
    stopped: bool,
    ranks_of: Mapping[str, Sequence[int]],
) -> int:
    """The verdict of this attempt; prints its reason on standard error. The verdict in status.json wins, because srun's
    exit code is different after killed tasks. Completes status.json if the ranks recorded no verdict.

    Args:
        code, ended: Results of `run_step`.
        stopped: The batch script got a stop signal.
        ranks_of: The ranks of each host.
    """
    record = folder.read_status().of(job.attempt_id)
    lost = next((line for line in ended if "Node failure on" in line), "")
    # A rank that was killed, or lost with its node, recorded no reason: status.json holds a peer's follow-up error.
    silent = lost or next((line for line in ended[:1] if "Exited" not in line), "")
    if record is not None and record.verdict is not None and not (silent and record.verdict == EXIT_FAILED):
        if record.verdict not in (EXIT_DONE, STOPPED):
            _show_cause(folder, job, [] if record.rank is None else [record.rank], ended)
        _say(f"verdict {record.verdict}: {record.reason.partition(chr(10))[0]}")
        return record.verdict
    if stopped and not lost:
        _say("a stop signal ended the ranks before they could save; the last checkpoint is intact")
        return STOPPED
    ends = [match for line in ended if (match := _ENDED.match(line))]
    verdict = EXIT_FAILED if silent else next((int(match[2]) for match in ends if match[2]), code)
    if verdict:
        reason = (silent or ended[0]).removeprefix("srun: error: ") if ended else f"srun ended with {code}"
        if record is not None:
            last = max(record.last_step, committed_step(folder.checkpoints))
            with contextlib.suppress(OSError, MoeDistError):  # on a full disk the exit code alone reports the failure
                folder.amend_status(job.attempt_id, verdict=verdict, reason=reason, rank=None, last_step=last)
        _show_cause(folder, job, ranks_of.get(ends[0][1], []) if ends and not lost else [], ended)
        _say(f"verdict {verdict}: {reason}; the ranks' logs are in {folder.logs}")
    return verdict


def requeue_job(job: SlurmJob, snapshot: CodeSnapshot, limit: str | None) -> None:
    """Requeues the job, unless it has reached its restart `limit` or Slurm is already ending it. Slurm requeues a preempted
    job itself, and a cancelled job must not come back."""
    array = [] if job.task is None else [f"--array={job.task}"]
    again = shlex.join(["sbatch", *array, str(snapshot.script)])
    if limit is not None:
        _say(f"not requeued: {limit}; to continue anyway: {again}")
        return
    if (state := job.state()) not in ("RUNNING", ""):  # a requeue would undo a scancel
        _say(f"Slurm is ending the job ({state}): a preempted job is requeued; continue a cancelled one with: {again}")
        return
    try:
        ask("scontrol", "requeue", job.id)
        _say("requeued: the next attempt resumes from the last checkpoint")
    except SlurmError as error:
        _say(f"Slurm refuses to requeue the job: {error}; continue with: {again}")


def _show_cause(folder: RunFolder, job: SlurmJob, candidates: Sequence[int], ended: Sequence[str]) -> None:
    """Prints the last output of the rank that failed first, then srun's lines about all failed tasks. `candidates` are the
    failed rank, or all ranks of the node that srun names; the first candidate with a traceback is shown."""
    outputs: dict[int, str] = {}
    for rank in candidates:
        with contextlib.suppress(OSError):
            log = folder.log_of(rank)
            outputs[rank] = last_output(log, max(0, log.read_bytes().rfind(f"--- attempt {job.attempt_id}".encode())))
    if outputs:
        rank = next((rank for rank, text in outputs.items() if text.startswith("Traceback")), next(iter(outputs)))
        _say(f"rank {rank} failed first; {folder.log_of(rank)} ends with:\n\n{outputs[rank]}\n")
    if ended:
        _say("\n".join(["the tasks ended in this order:", *ended]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
