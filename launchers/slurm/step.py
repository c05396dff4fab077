"""Runs the srun step of a Slurm job, reads how its tasks ended, and requeues the job."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.command import ranks_of
from launchers.rank_tracker import CLEAN, Outcome
from launchers.restart import STOPPED
from launchers.slurm.nodes import SlurmError, ask, lost_among, outside_jobs
from launchers.slurm.script import HOLD_SIGNALS
from launchers.snapshot import CodeSnapshot
from launchers.verdict import Verdict, write
from moe_dist.config.cluster import Cluster, PyxisContainer
from moe_dist.errors import EXIT_FAILED, ConfigError
from moe_dist.runtime.lease import WAIT_SECONDS
from moe_dist.runtime.run_folder import RunFolder

# Slurm kills this process KillWait (30 s by default) after a node failure, and srun may need longer than KillWait to end.
NODE_SECONDS = 5.0  # seconds from a node failure until this process kills srun, so that time remains to record the cause
PEER_SECONDS = 6.0  # seconds from a task's failure until srun kills the other tasks; until then they log their errors
_ENDED = re.compile(
    r"srun: error: (?:Node failure on (?P<lost>\S+)|"
    r"(?P<node>\S+): tasks? (?P<tasks>[\d,-]+): "
    r"(?:Exited with exit code (?P<code>\d+)|(?P<how>.+?))(?: \(core dumped\))?\s*$)"
)
_KILLS = re.compile(r"srun: (?:First task exited|Terminating |Job step aborted|forcing job termination)")
_MEMORY = re.compile(r"slurmstepd\S*: error: (.*(?:memory limit|oom.?kill).*)", re.IGNORECASE)
_CODES = {signal.strsignal(each): -each for each in signal.Signals} | {"Out Of Memory": -signal.SIGKILL}  # srun's text
Places = Mapping[str, Mapping[int, int]]  # maps each host, and each task on it, to a rank


@dataclass(frozen=True)
class SlurmJob:
    """The Slurm job in which this process runs.

    Attributes:
        task: Number of the array task; None if the job is no array.
        array: Job id of the array; None if the job is no array.
    """

    id: str
    restarts: int
    task: int | None
    submitted: Path
    array: str | None = None

    @classmethod
    def from_environment(cls, env: Mapping[str, str]) -> "SlurmJob":
        """Reads the variables of Slurm below, and SLURM_SUBMIT_DIR. Raises ConfigError outside a Slurm job."""
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
        """A name that no other job has. The job id is not enough, because the last task of an array has the id of the whole
        array."""
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
    """Runs srun to its end, and ends srun soon after a task has failed. Returns srun's exit code, and its error lines about
    failed tasks and memory limits, in order. Standard output goes to the job's file."""
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace", env=env
    )
    kept: list[str] = []

    def later(seconds: float, end: Callable[[], None]) -> None:  # has no effect on a process that has ended
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()

    assert process.stderr is not None
    for line in process.stderr:
        match = _ENDED.match(line)
        if match or _KILLS.match(line) or _MEMORY.match(line):
            kept.append(line.strip())
        if match and match["lost"]:
            later(NODE_SECONDS, process.kill)
        elif match and int(match["code"] or EXIT_FAILED) not in CLEAN:
            later(PEER_SECONDS, process.terminate)  # srun then kills all tasks
        if not match:
            sys.stderr.write(line)
            sys.stderr.flush()
    code = process.wait()
    return (128 - code if code < 0 else code), kept  # a shell reports signal N as exit code 128 + N


def outcome_of(code: int, lines: Sequence[str], places: Places, *, stopped: bool) -> Outcome:
    """Returns how the ranks ended. `code` and `lines` are results of `run_step`. A task without a line counts as ended with
    0, because srun prints no line about such a task."""
    host_of = {rank: host for host, ranks in places.items() for rank in ranks.values()}
    codes, failed, lost, words = dict.fromkeys(sorted(host_of), 0), list[int](), dict[int, str](), dict[int, str]()
    memory, killed = "", False  # Slurm's message about a memory limit; whether srun has begun to kill tasks
    for line in lines:
        killed = killed or _KILLS.match(line) is not None
        memory = match[1] if (match := _MEMORY.match(line)) else memory
        if (match := _ENDED.match(line)) is None:
            continue
        on_node = places.get(match["lost"] or match["node"], {})
        ended = -signal.SIGKILL if match["lost"] else int(match["code"] or _CODES.get(match["how"], EXIT_FAILED))
        ranks = sorted(on_node.values()) if match["lost"] else [on_node[n] for n in _tasks(match["tasks"]) if n in on_node]
        codes |= dict.fromkeys(ranks, ended)
        if match["lost"]:
            lost |= dict.fromkeys(ranks, f"Node failure on {match['lost']}")
        if match["how"] == "Out Of Memory" or (memory and ended == -signal.SIGKILL and not killed):
            words |= dict.fromkeys(ranks, memory or "out of memory")
        if ended not in CLEAN and not (killed and ended in (-signal.SIGKILL, -signal.SIGTERM)):
            failed += ranks
    # Slurm also sends stop signals after a node failure. If a rank stopped before any rank failed, the signal was a
    # request to stop.
    first = next((match["code"] for line in lines if (match := _ENDED.match(line))), None)
    stop = signal.SIGTERM if not lost and (stopped or first == str(STOPPED)) else None
    hosts = tuple(host_of[rank] for rank in codes)
    return Outcome(tuple(codes.values()), tuple(failed), stop, lost=lost, words=words, hosts=hosts, launched=code)


def _tasks(text: str) -> list[int]:
    """Returns the numbers in srun's list of tasks: `0-2,5` means 0, 1, 2, 5."""
    bounds = [part.split("-") for part in text.split(",")]
    return [number for part in bounds for number in range(int(part[0]), int(part[-1]) + 1)]


def name_unconcluded(
    folder: RunFolder, attempt_id: str, on_host: Mapping[str, Sequence[int]], *, asked: bool, restarts: int
) -> int:
    """Records and returns the verdict of an attempt whose batch script was killed by Slurm before the script recorded a
    verdict. The reason names the nodes of this attempt that are down now. `on_host` has the ranks on each host. `asked`
    tells whether the batch script, which ran on the first host, had received a stop signal."""
    record = folder.read_status().of(attempt_id)
    if record is not None and record.verdict not in (None, EXIT_FAILED):
        return record.verdict
    lost = lost_among([*on_host])
    ranks = sorted(rank for host in lost for rank in on_host[host])
    where = f" on {next(iter(on_host))}" if on_host else ""
    code, killed = EXIT_FAILED, f"Slurm killed the batch script{where}"
    if lost:
        reason = (f"{ranks_of(ranks)}: " if ranks else "") + f"Node failure on {', '.join(lost)}"
    elif asked:
        code, reason = STOPPED, f"{killed} after a request to stop, before the ranks had saved: KillWait is too short"
    else:
        seen = f"; rank {record.rank} reported: {record.reason}" if record is not None and record.reason else ""
        reason = f"{killed} before it could name the cause: its node failed, or KillWait is too short{seen}"
    verdict = Verdict(code, reason, ranks[0] if ranks else None)
    write(folder, attempt_id, verdict, restarts=restarts, wait_seconds=WAIT_SECONDS)
    return code


def requeue_job(job: SlurmJob, snapshot: CodeSnapshot, attempts: Path, limit: str | None) -> None:
    """Makes Slurm run the job again, unless `limit` is a reason against a restart, or the job was cancelled. Slurm itself
    requeues a job after a node failure and after a preemption with PreemptMode=REQUEUE. After a preemption with
    PreemptMode=CANCEL, this function submits the job again. The new job takes over the file `attempts` of the old job's
    attempts, and the file of the nodes at fault."""
    array = [] if job.task is None else [f"--array={job.task}"]
    again = ["sbatch", *array, str(snapshot.script)]
    if limit is not None:
        _say(f"not requeued: {limit}; to continue anyway: {shlex.join(again)}")
        return
    fields = job.fields()
    state = fields.get("JobState", "RUNNING")
    try:
        if int(fields.get("Restarts", "0")) > job.restarts:
            _say(f"Slurm has requeued the job ({state})")
        elif state == "RUNNING":
            ask("scontrol", "requeue", job.name)
            _say("requeued")
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


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
