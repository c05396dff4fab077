"""Runs the srun step of a Slurm job, determines its verdict (the recorded exit code), and requeues the job."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launchers.attempts import last_output
from launchers.command import rank_ranges
from launchers.rank_tracker import SUDDEN
from launchers.restart import STOPPED, committed_step, is_final
from launchers.slurm.nodes import SlurmError, ask, lost_among, outside_jobs
from launchers.slurm.script import HOLD_SIGNALS
from launchers.snapshot import CodeSnapshot
from moe_dist.config.cluster import Cluster, PyxisContainer
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, ConfigError, MoeDistError
from moe_dist.runtime.lease import WAIT_SECONDS
from moe_dist.runtime.run_folder import RunFolder

# Slurm kills this process KillWait (30 s by default) after a node failure, and srun may need longer than KillWait to end.
NODE_SECONDS = 5.0  # from the node failure until this process kills srun, in time to record the cause
LEASE_SECONDS = 5.0  # wait until rank 0 releases the run folder's lease, because then the cause can be recorded
_ENDED = re.compile(
    r"srun: error: (?:Node failure on (?P<lost>\S+)|"
    r"(?P<node>\S+): tasks? (?P<tasks>[\d,-]+): (?P<how>Exited with exit code (?P<code>\d+)|.+?)(?: \(core dumped\))?\s*$)"
)
_KILLS = re.compile(r"srun: (?:First task exited|Terminating |Job step aborted|forcing job termination)")
# srun's words for a task that a signal killed -> the signal. A task that a signal killed cannot record a reason.
_SIGNALS = {signal.strsignal(-each): f"killed by {signal.Signals(-each).name}" for each in SUDDEN}
_SIGNALS["Out Of Memory"] = "killed, out of memory"
Places = Mapping[str, Mapping[int, int]]  # host -> task -> rank


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job in which this process runs.

    Attributes:
        id: Job id; each array task has its own id.
        restarts: Number of times that Slurm has requeued the job.
        task: Number of the array task; None if the job is no array.
        submitted: Folder in which sbatch was called.
        array: Job id of the array; None if the job is no array.
    """

    id: str
    restarts: int
    task: int | None
    submitted: Path
    array: str | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "SlurmJob":
        """Reads SLURM_JOB_ID, SLURM_RESTART_COUNT, SLURM_ARRAY_TASK_ID, SLURM_ARRAY_JOB_ID and SLURM_SUBMIT_DIR. Raises
        ConfigError outside a Slurm job."""
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
            array=env.get("SLURM_ARRAY_JOB_ID"),
        )

    @property
    def name(self) -> str:
        """The name by which Slurm's commands find only this job. The id of an array's last task would not do, because it is
        also the id of the whole array."""
        return self.id if self.array is None else f"{self.array}_{self.task}"

    @property
    def attempt_id(self) -> str:
        """A unique name of this attempt."""
        return f"slurm-{re.sub('[^A-Za-z0-9]', '', os.environ.get('SLURM_CLUSTER_NAME', ''))}-{self.id}-{self.restarts}"

    def fields(self) -> Mapping[str, str]:
        """Returns the fields of Slurm's record of the job, such as JobState=RUNNING; none if Slurm does not answer."""
        with contextlib.suppress(SlurmError):
            env = {**os.environ, "SLURM_TIME_FORMAT": "standard"}
            lines = ask("scontrol", "--oneliner", "show", "job", self.name, env=env).splitlines()
            words = lines[0].split()  # the first component of a heterogeneous job
            return dict(word.split("=", 1) for word in words if "=" in word)
        return {}


def hold_signals_prefix(cluster: Cluster) -> tuple[str, ...]:
    """Returns the command prefix that blocks the stop signals; empty if this node's `env` lacks --block-signal (coreutils
    before 8.31, for example on RHEL 8). Without the prefix, a stop signal kills a rank that has not yet installed its
    handlers, and nothing is saved."""
    if isinstance(cluster.container, PyxisContainer):  # the image's `env` cannot be tested outside the container
        return HOLD_SIGNALS
    supported = subprocess.run([*HOLD_SIGNALS, "true"], capture_output=True, check=False).returncode == 0
    return HOLD_SIGNALS if supported else ()


def run_step(command: Sequence[str], env: Mapping[str, str] | None = None) -> tuple[int, list[str]]:
    """Runs srun to its end. Returns srun's exit code, and its error lines about failed tasks, in order. `conclude` prints
    the error lines after the failed rank's own output. Standard output goes to the job's file."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=env
    )
    ended: list[str] = []
    assert process.stderr is not None
    for line in process.stderr:
        if (match := _ENDED.match(line)) or _KILLS.match(line):
            ended.append(line.strip())
        if match and match["lost"]:
            timer = threading.Timer(NODE_SECONDS, process.kill)  # has no effect on a process that has ended
            timer.daemon = True
            timer.start()
        if not match:
            sys.stderr.write(line)
            sys.stderr.flush()
    code = process.wait()
    return (128 - code if code < 0 else code), ended  # a shell reports signal N as exit code 128 + N


def conclude(folder: RunFolder, job: SlurmJob, code: int, ended: Sequence[str], *, stopped: bool, places: Places) -> int:
    """Returns the verdict of this attempt, and prints its reason on standard error. A verdict in status.json takes
    precedence over srun's exit code, which is different if srun has killed tasks; an exit code that is no verdict of
    moe_dist counts as 1. Writes the verdict into status.json if the ranks recorded no verdict, or only a rank's follow-up
    error.

    Args:
        code, ended: Results of `run_step`.
        stopped: True if the batch script got a stop signal.
        places: The tasks of each host, with the rank of each task.
    """
    record = folder.read_status().of(job.attempt_id)
    ends = [match for line in ended if (match := _ENDED.match(line))]
    # A rank that was killed, or lost with its node, recorded no reason. status.json has another rank's follow-up error.
    silent = _first_death(ended)
    verdict = EXIT_FAILED if silent else next((int(match["code"]) for match in ends if match["code"]), code)
    requested = stopped and not (silent and silent["lost"])  # Slurm also sends stop signals after a node failure
    if record is not None and record.verdict == STOPPED != verdict and ends and not requested:
        record = replace(record, verdict=None)  # after a failure Slurm ends all tasks, which a rank took for a stop request
    if record is not None and record.verdict is not None and not (silent and record.verdict == EXIT_FAILED):
        if record.verdict not in (EXIT_DONE, STOPPED):
            _show_cause(folder, job, [] if record.rank is None else [record.rank], ended, places)
        _say(f"verdict {record.verdict}: {record.reason.partition(chr(10))[0]}")
        return record.verdict
    if requested:
        _say("a stop signal ended the ranks before they could save; the last checkpoint is intact")
        return STOPPED
    if verdict:
        first = silent or next(iter(ends), None)
        reason, ranks = _describe(first, places) if first else (f"srun ended with {code}", [])
        verdict = verdict if is_final(verdict) else EXIT_FAILED
        if record is not None:
            _record(folder, job.attempt_id, verdict, reason, rank=ranks[0] if ranks else None, last_step=record.last_step)
        _show_cause(folder, job, ranks if first and not first["lost"] else [], ended, places)
        _say(f"verdict {verdict}: {reason}; the ranks' logs are in {folder.logs}")
    return verdict


def host_at_fault(folder: RunFolder, job: SlurmJob, ended: Sequence[str], places: Places) -> str | None:
    """Returns the node that failed, or on which a signal killed a task first; else the node of the rank that recorded the
    cause; else the node of the task that ended first. Returns None if no node is known. Call it after `conclude`."""
    if first := _first_death(ended):
        return first["lost"] or first["node"]
    record = folder.read_status().of(job.attempt_id)
    recorded = [host for host, tasks in places.items() if record is not None and record.rank in tasks.values()]
    return next(iter([*recorded, *(match["node"] for line in ended if (match := _ENDED.match(line)))]), None)


def name_unconcluded(folder: RunFolder, attempt_id: str, ranks_of: Mapping[str, Sequence[int]]) -> int:
    """Records and returns the verdict of an attempt whose batch script Slurm killed before `conclude`. The reason names the
    nodes of this attempt that are down now.

    Args:
        ranks_of: The ranks on each host of the attempt; the first host ran the batch script.
    """
    record = folder.read_status().of(attempt_id)
    if record is None:
        return EXIT_FAILED
    if record.verdict not in (None, EXIT_FAILED):
        return record.verdict
    lost = lost_among([*ranks_of])
    ranks = sorted(rank for host in lost for rank in ranks_of[host])
    if lost:
        reason = (f"{_ranks_text(ranks)}: " if ranks else "") + f"Node failure on {', '.join(lost)}"
    else:
        where = f" on {next(iter(ranks_of))}" if ranks_of else ""
        seen = f"; rank {record.rank} reported: {record.reason}" if record.reason else ""
        reason = (
            f"Slurm killed the batch script{where} before it could name the cause: its node failed, or KillWait is too "
            f"short{seen}"
        )
    rank = ranks[0] if ranks else None
    _record(folder, attempt_id, EXIT_FAILED, reason, rank=rank, last_step=record.last_step, wait_seconds=WAIT_SECONDS)
    return EXIT_FAILED


def requeue_job(job: SlurmJob, snapshot: CodeSnapshot, attempts: Path, limit: str | None) -> None:
    """Makes Slurm run the job again, unless `limit` has a reason against a restart, or the job was cancelled. Slurm itself
    requeues a job after a node failure and after a preemption with PreemptMode=REQUEUE. After a preemption with
    PreemptMode=CANCEL, this function submits the job again.

    Args:
        attempts: File with the job's attempts. A new submission takes over the file with the job's attempts, and the file
            of the nodes at fault.
    """
    array = [] if job.task is None else [f"--array={job.task}"]
    again = ["sbatch", *array, str(snapshot.script)]
    if limit is not None:
        _say(f"not requeued: {limit}; to continue anyway: {shlex.join(again)}")
        return
    fields = job.fields()
    state = fields.get("JobState", "RUNNING")
    try:
        if int(fields.get("Restarts", "0")) > job.restarts:
            _say(f"Slurm has requeued the job ({state}): the next attempt resumes from the last checkpoint")
        elif state == "RUNNING":
            ask("scontrol", "requeue", job.name)
            _say("requeued: the next attempt resumes from the last checkpoint")
        elif fields.get("StartTime", "") <= fields.get("PreemptTime", "None") < "A":  # preempted after this attempt began
            after = [again[0], "--parsable", f"--dependency=afterany:{job.name}", *again[1:]]
            number = ask(*after, env=outside_jobs(os.environ)).strip().partition(";")[0]
            for name in ("job_{}.json", "job_{}_faults"):  # copied in time: the new job starts after this job's end
                if (kept := attempts.with_name(name.format(job.id))).is_file():
                    shutil.copy(kept, attempts.with_name(name.format(number)))
            _say(f"Slurm preempted the job and does not requeue it (PreemptMode=CANCEL); submitted again as job {number}")
        else:  # no requeue, because it would undo a scancel
            _say(f"Slurm is ending the job ({state}) for good; continue it with: {shlex.join(again)}")
    except SlurmError as error:
        _say(f"Slurm refuses to requeue the job: {error}; continue with: {shlex.join(again)}")


def _first_death(ended: Sequence[str]) -> re.Match[str] | None:
    """Finds srun's line about the node that failed, or about the first task that a signal killed. Returns None if srun
    itself killed that task, or if a task ended earlier with an exit code that rules out a restart."""
    matches = [_ENDED.match(line) for line in ended]
    if lost := next((match for match in matches if match and match["lost"]), None):
        return lost
    for match in matches:
        if match is None or (match["code"] and is_final(int(match["code"]))):  # without a match srun kills the later tasks
            break
        if match["how"] in _SIGNALS:
            return match
    return None


def _describe(match: re.Match[str], places: Places) -> tuple[str, list[int]]:
    """Rewrites srun's line in terms of ranks; also returns these ranks. Keeps a line about tasks without a planned rank."""
    node = match["node"] or match["lost"]
    on_node = places.get(node, {})
    bounds = [part.split("-") for part in (match["tasks"] or "").split(",") if part]
    tasks = [task for part in bounds for task in range(int(part[0]), int(part[-1]) + 1)]
    ranks = sorted(on_node.values()) if match["lost"] else [on_node[task] for task in tasks if task in on_node]
    if not ranks:
        return match[0].removeprefix("srun: error: "), []
    what = f": Node failure on {node}" if match["lost"] else f" on {node}: {_SIGNALS.get(match['how'], match['how'])}"
    return _ranks_text(ranks) + what, ranks


def _ranks_text(ranks: Sequence[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {rank_ranges(ranks)}"


def _record(
    folder: RunFolder,
    attempt_id: str,
    verdict: int,
    reason: str,
    *,
    rank: int | None,
    last_step: int,
    wait_seconds: float = LEASE_SECONDS,
) -> None:
    """Writes the end of the run into status.json. Replaces a follow-up error that another rank has already written."""
    ended = {"verdict": verdict, "reason": reason, "rank": rank, "attempt_id": attempt_id}
    last = max(last_step, committed_step(folder.checkpoints))
    with contextlib.suppress(OSError, MoeDistError):  # on a full disk the exit code alone reports the failure
        # write_status works while rank 0 hangs and holds the lease; amend_status replaces the error of another rank.
        if not folder.write_status(**ended, last_step=last):
            folder.amend_status(**ended, last_step=last, wait_seconds=wait_seconds)


def _show_cause(folder: RunFolder, job: SlurmJob, candidates: Sequence[int], ended: Sequence[str], places: Places) -> None:
    """Prints the last output of the rank that failed first, then srun's lines about all failed tasks. `candidates` are the
    failed rank, or all ranks of the node that srun names; the first candidate with a traceback is shown."""
    outputs: dict[int, str] = {}
    for rank in candidates:
        with contextlib.suppress(OSError):
            log = folder.log_of(rank)
            outputs[rank] = last_output(log, max(0, log.read_bytes().rfind(f"--- attempt {job.attempt_id}".encode())))
    if outputs:
        rank = next((rank for rank, text in outputs.items() if text.startswith("Traceback")), next(iter(outputs)))
        where = next((f" on {host}" for host, tasks in places.items() if rank in tasks.values()), "")
        _say(f"rank {rank} failed first{where}; {folder.log_of(rank)} ends with:\n\n{outputs[rank]}\n")
    if ended:
        _say("\n".join(["the tasks ended in this order:", *ended]))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
