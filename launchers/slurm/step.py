"""The step of a Slurm job, srun with one task a rank: run it, tell its verdict, and see to the next attempt."""

import contextlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.attempts import last_words
from launchers.restart import committed_step
from launchers.slurm.allocation import SlurmError, ask
from launchers.slurm.script import HOLD_SIGNALS
from launchers.snapshot import Snapshot
from moe_dist.config.cluster import Cluster, PyxisContainer
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError, StoppedError
from moe_dist.runtime.run_folder import RunFolder

STOPPED = StoppedError.exit_code
_ENDED = re.compile(r"srun: error: (?:(\S+): tasks? [\d,-]+: (?:Exited with exit code (\d+)|.+)|Node failure on \S+)")


@dataclass(frozen=True)
class SlurmJob:
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
    def from_environment(cls) -> "SlurmJob":
        """Reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_ARRAY_TASK_ID and SLURM_SUBMIT_DIR.

        Raises:
            ConfigError: this is no batch script.
        """
        if "SLURM_JOB_ID" not in os.environ:
            raise ConfigError("this is the end of slurm/train.sbatch; submit that, or use moe-dist launch slurm CONFIG")
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

    def state(self) -> str:
        """In Slurm's words, as RUNNING; empty where Slurm does not say."""
        with contextlib.suppress(SlurmError):
            match = re.search(r"JobState=(\S+)", ask("scontrol", "--oneliner", "show", "job", self.id))
            return match[1] if match else ""
        return ""


def held(cluster: Cluster) -> tuple[str, ...]:
    """`HOLD_SIGNALS` where this node's `env` can; else nothing (coreutils before 8.31, as on RHEL 8): a signal that comes
    before a rank has its handlers then ends it unsaved. The `env` of a pyxis container cannot be asked from here."""
    if isinstance(cluster.container, PyxisContainer):
        return HOLD_SIGNALS
    can = subprocess.run([*HOLD_SIGNALS, "true"], capture_output=True, check=False).returncode == 0
    return HOLD_SIGNALS if can else ()


def run_step(command: Sequence[str]) -> tuple[int, list[str]]:
    """Runs srun to its end.

    Returns:
        Its exit code, and its lines about tasks that ended badly, in order; those are held back, for what the cause said
        comes first.
    """
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    ended: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        if _ENDED.match(line):
            ended.append(line.strip())
        else:
            sys.stderr.write(line)
            sys.stderr.flush()
    code = process.wait()
    return (128 - code if code < 0 else code), ended


def conclude(
    folder: RunFolder,
    job: SlurmJob,
    code: int,
    ended: Sequence[str],
    *,
    stopped: bool,
    ranks_of: Mapping[str, Sequence[int]],
) -> int:
    """The verdict of this attempt, with its reason on standard error: that in status.json, since srun returns other codes
    where tasks are killed. Puts one there where the ranks could not.

    Args:
        code, ended: As `run_step` returned them.
        stopped: Whether a stop signal has reached the batch script.
        ranks_of: The ranks of each host.
    """
    ending = folder.read_status().of(job.attempt_id)
    lost = next((line for line in ended if "Node failure on" in line), "")
    # Who was killed, by a signal or with its node, could say nothing; what its peers say is a consequence.
    silent = lost or next((line for line in ended[:1] if "Exited" not in line), "")
    if ending is not None and ending.verdict is not None and not (silent and ending.verdict == EXIT_FAILED):
        if ending.verdict not in (EXIT_DONE, STOPPED):
            _show_cause(folder, job, [] if ending.rank is None else [ending.rank], ended)
        _say(f"verdict {ending.verdict}: {ending.reason.partition(chr(10))[0]}")
        return ending.verdict
    if stopped and not lost:
        _say("a stop signal ended the ranks before they could save; what the last checkpoint has is safe")
        return STOPPED
    ends = [match for line in ended if (match := _ENDED.match(line))]
    verdict = EXIT_FAILED if silent else next((int(match[2]) for match in ends if match[2]), code)
    if verdict:
        reason = (silent or ended[0]).removeprefix("srun: error: ") if ended else f"srun ended with {code}"
        if ending is not None:
            last = max(ending.last_step, committed_step(folder.checkpoints))
            with contextlib.suppress(OSError, MoeDistError):
                folder.amend_status(job.attempt_id, verdict=verdict, reason=reason, rank=None, last_step=last)
        _show_cause(folder, job, ranks_of.get(ends[0][1], []) if ends and not lost else [], ended)
        _say(f"verdict {verdict}: {reason}; the ranks' logs are in {folder.logs}")
    return verdict


def start_again(job: SlurmJob, snapshot: Snapshot, no: str | None) -> None:
    """Requeues the job after 75, unless its attempts are enough, or Slurm ends it already: preempted jobs are requeued by
    then, cancelled ones are to stay away.

    Args:
        no: Why its attempts are enough; None where they are not.
    """
    array = [] if job.task is None else [f"--array={job.task}"]
    again = shlex.join(["sbatch", *array, str(snapshot.script)])
    if no is not None:
        _say(f"not requeued: {no}; to go on all the same: {again}")
        return
    if (state := job.state()) not in ("RUNNING", ""):  # its fate is decided, and a requeue would undo a scancel
        _say(f"Slurm takes the job away by itself ({state}): preempted it comes back, cancelled it goes on with: {again}")
        return
    try:
        ask("scontrol", "requeue", job.id)
        _say("requeued: the next attempt goes on from here")
    except SlurmError as error:
        _say(f"Slurm refuses to requeue the job: {error}; go on with: {again}")


def _show_cause(folder: RunFolder, job: SlurmJob, slow_pairs: Sequence[int], ended: Sequence[str]) -> None:
    """What the rank that failed first said last, then how all ended.

    Args:
        slow_pairs: That rank; or all of the node that srun named, of which the first with a traceback is taken.
    """
    said: dict[int, str] = {}
    for rank in slow_pairs:
        with contextlib.suppress(OSError):
            log = folder.log_of(rank)
            said[rank] = last_words(log, max(0, log.read_bytes().rfind(f"--- attempt {job.attempt_id}".encode())))
    if said:
        rank = next((rank for rank, words in said.items() if words.startswith("Traceback")), next(iter(said)))
        _say(f"rank {rank} failed first; {folder.log_of(rank)} ends with:\n\n{said[rank]}\n")
    if ended:
        _say("\n".join(["the tasks ended in this order:", *ended]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
