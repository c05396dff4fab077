"""Reads a Slurm job's allocation, compares it with the plan, and maps the planned nodes to host names."""

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launchers.command import JobPlan
from launchers.slurm.script import ScriptPart, parts
from moe_dist.errors import MoeDistError
from moe_dist.runtime.node.check_result import names
from moe_dist.runtime.signals import child_of

_SECONDS = 60.0  # timeout of a Slurm command; a busy slurmctld answers late
# Variables by which Slurm's commands find slurmctld.
_CLIENT = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SLURM_SACK", "SLURM_WORKING_CLUSTER")
# Variables that Slurm sets in a batch script with the options --nodes, --ntasks and --ntasks-per-node, which all scripts of
# moe_dist have.
_OF_EVERY_JOB = re.compile(
    r"SLURM_(?:JOB_\w+|JOBID|NODELIST|NNODES|NPROCS|NTASKS|NTASKS_PER_NODE|TASKS_PER_NODE|CPUS_ON_NODE|GPUS_ON_NODE|"
    r"CLUSTER_NAME|SUBMIT_\w+)(?:_HET_GROUP_\d+)?"
)
# States of a node that cannot run its job. POWERED_DOWN and POWERING_DOWN, which only save power, do not match.
_DOWN = re.compile(r"\b(?:DOWN|NOT_RESPONDING)\b|\*")


class SlurmError(MoeDistError):
    """A Slurm command failed."""


@dataclass(frozen=True)
class GivenPart:
    """The nodes allocated to a job, or to one component of a heterogeneous job. `gpus` is the number of GPUs per node; -1
    if the number is unknown."""

    hosts: tuple[str, ...]  # in Slurm's order
    tasks: tuple[int, ...]  # number of tasks of each node
    gpus: int


@dataclass(frozen=True)
class Allocation:
    """All nodes allocated to a job. A heterogeneous job has one part per component, any other job has one part."""

    parts: tuple[GivenPart, ...]
    features: Mapping[str, str]  # comma-separated features of each host

    @classmethod
    def read(cls, env: Mapping[str, str]) -> "Allocation":
        """Reads the job's environment, and asks Slurm for the host names and features of the nodes."""
        # Each component of a heterogeneous job costs two queries of slurmctld. Only the batch script runs this code,
        # because slurmctld would be overloaded if every rank sent these queries.
        size = int(env.get("SLURM_HET_SIZE", "0"))
        suffixes = [f"_HET_GROUP_{index}" for index in range(size)] if size else [""]
        given, features = [], {}
        for suffix in suffixes:
            listed = env.get(f"SLURM_JOB_NODELIST{suffix}", "")
            hosts = tuple(ask("scontrol", "show", "hostnames", listed).split())
            tasks = expand_counts(env.get(f"SLURM_TASKS_PER_NODE{suffix}", ""))
            # Slurm gives only the number of GPUs on this node, which is in the first component.
            gpus = env.get("SLURM_GPUS_ON_NODE", "0") if not suffix or suffix.endswith("_0") else ""
            given.append(GivenPart(hosts, tasks, int(gpus) if gpus.isdecimal() else -1))
            nodes = ask("scontrol", "--oneliner", "show", "node", listed)
            # ActiveFeatures is read, because Slurm may change the features of a node at boot.
            features |= dict(re.findall(r"NodeName=(\S+) .*?\bActiveFeatures=(\S*)", nodes))
        return cls(tuple(given), {host: "" if has == "(null)" else has for host, has in features.items()})


def outside_jobs(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment with which a job is submitted. Omits the Slurm variables of a surrounding job: sbatch would
    pass them on, and Slurm does not overwrite all of them in the new job."""
    of_slurm = ("SLURM", "SRUN_")
    own = {name: value for name, value in env.items() if not name.startswith(of_slurm) or name.startswith(_CLIENT)}
    return own if "SLURM_JOB_ID" in env else dict(env)


def inside_job(env: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a batch script without the variables of an outer job. If a plain sbatch inside another job
    submitted this job, Slurm does not overwrite all variables of the outer job. Most of the remaining variables are options
    of srun. Keeps only `_OF_EVERY_JOB`. Also keeps the variables of array task, restarts, components and CPUs per task if
    slurmctld's record confirms them."""
    if "SLURM_JOB_ID" not in env:
        return dict(env)
    record = _record(env["SLURM_JOB_ID"])
    found = dict(re.findall(r"\b(ArrayJobId|ArrayTaskId|HetJobId|Restarts)=(\d+)", record))
    # A job has 1 CPU per task unless it requests more; Slurm 23.11 and newer also tell whether it requested 1.
    cpus = re.search(r"\bTresPerTask=\S*?cpu[:=](\d+)|\bCPUs/Task=(?!1\b)(\d+)", record)
    believed = {
        "SLURM_ARRAY_JOB_ID": found.get("ArrayJobId"),
        "SLURM_ARRAY_TASK_ID": found.get("ArrayTaskId"),
        "SLURM_CPUS_PER_TASK": cpus and (cpus[1] or cpus[2]),
        "SLURM_HET_SIZE": env.get("SLURM_HET_SIZE") if "HetJobId" in found else None,
        "SLURM_RESTART_COUNT": found.get("Restarts", "0"),
    }
    kept = {name: value for name, value in env.items() if not name.startswith(("SLURM_", "SRUN_")) or _is_own(name)}
    return kept | {name: value for name, value in believed.items() if value is not None}


def _is_own(name: str) -> bool:
    return name.startswith(_CLIENT) or _OF_EVERY_JOB.fullmatch(name) is not None


def ask(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """Runs a Slurm command and returns its output. Raises SlurmError, with a message of one line, if the command fails, is
    not installed, or does not answer within a minute."""
    ours = child_of(os.getpid(), ignore_stop=True)  # when Slurm requeues a job, it sends stop signals to all its processes
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_SECONDS, check=False, cwd=cwd, env=env, preexec_fn=ours
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{command[0]}: {error}; run this on a machine with the Slurm commands") from error
    if done.returncode:
        words = " / ".join(filter(None, map(str.strip, done.stderr.splitlines())))
        raise SlurmError(f"{' '.join(command)}: {words or f'exit code {done.returncode}'}")
    return done.stdout


def _record(job_id: str) -> str:
    """Returns slurmctld's record of a job. `job_id` is the job's id or, for a task of an array, ARRAY_TASK. scontrol
    prints one line for each part of an array or of a heterogeneous job."""
    shown = ask("scontrol", "--oneliner", "show", "job", job_id)
    return next((line for line in shown.splitlines() if line.startswith(f"JobId={job_id} ")), shown)


def lost_among(hosts: Sequence[str]) -> list[str]:
    """Returns the hosts of a job that are down now; empty if Slurm does not answer."""
    with contextlib.suppress(SlurmError):
        shown = ask("scontrol", "--oneliner", "show", "node", ",".join(hosts))
        states = dict(re.findall(r"NodeName=(\S+) .*?\bState=(\S+)", shown))
        return [host for host in hosts if _DOWN.search(states.get(host, ""))]
    return []


def leave_out(job_id: str, hosts: Sequence[str], script: Path) -> str:
    """Excludes hosts from the next attempt of a requeued job, unless too few nodes would be left. Returns a line for the
    user, which tells whether the hosts were excluded."""
    names = ", ".join(dict.fromkeys(hosts))
    try:
        record = _record(job_id)
        if "JobState=RUNNING" in record:  # the job was not requeued
            return f"nodes at fault: {names}"
        before = re.search(r"\bExcNodeList=([^\s(]+)", record)
        excluded = ",".join(dict.fromkeys([*([before[1]] if before else []), *hosts]))
        # sbatch tests the exclusion first, because scontrol would accept an exclusion that leaves too few nodes.
        ask("sbatch", "--test-only", f"--exclude={excluded}", str(script), env=outside_jobs(os.environ))
        ask("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={excluded}")
    except SlurmError as error:
        return f"nodes at fault: {names}; the next attempt may use them again: {error}"
    return f"nodes at fault: {names}; the next attempt leaves them out"


def expand_counts(text: str) -> tuple[int, ...]:
    """Expands SLURM_TASKS_PER_NODE: `2(x3),1` means 2, 2, 2, 1."""
    counts: list[int] = []
    for each in filter(None, text.split(",")):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", each)
        if match is None:
            raise SlurmError(f"SLURM_TASKS_PER_NODE={text!r}: must have the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def differences(job: JobPlan, allocation: Allocation, spare: int = 0) -> list[str]:
    """Describes each difference between an allocation and the plan plus `spare` nodes; empty if there is no difference."""
    wanted, given = parts(job), allocation.parts
    if len(wanted) != len(given):
        return [f"the plan needs {_count(len(wanted), 'kind')} of nodes, the job has {_count(len(given), 'component')}"]
    problems = []
    for index, (part, have) in enumerate(zip(wanted, given, strict=True)):
        where = f"part {index}: " if len(wanted) > 1 else ""
        found = _part_differences(part, have, job.gpus_per_node, allocation.features, spare)
        problems += [f"{where}{problem}" for problem in found]
    return problems


def hosts_of(job: JobPlan, allocation: Allocation, faulty: Sequence[str] = ()) -> tuple[str, ...]:
    """Returns the host of each planned node. The allocation must match the plan. Spare hosts replace `faulty` hosts."""
    host_of = {
        node.index: host
        for part, have in zip(parts(job), allocation.parts, strict=True)
        for node, host in zip(part.nodes, sorted(have.hosts, key=lambda host: host in faulty), strict=False)
    }
    return tuple(host_of[node.index] for node in job.nodes)


def ranks_by_task(job: JobPlan, hosts: Sequence[str], allocated: Sequence[str]) -> dict[str, dict[int, int]]:
    """Returns the rank of each task on each host. Slurm numbers the tasks of a component node by node. `allocated` are
    the job's hosts in Slurm's order. The plan's order of hosts differs from Slurm's order if a node was at fault."""
    found = {}
    for part in parts(job):
        in_order = sorted(part.nodes, key=lambda node: allocated.index(hosts[node.index]))
        for position, node in enumerate(in_order):
            found[hosts[node.index]] = dict(enumerate(node.ranks, position * part.ranks_per_node))
    return found


def _part_differences(part: ScriptPart, have: GivenPart, gpus: int, features: Mapping[str, str], spare: int) -> list[str]:
    problems = []
    size, count = part.ranks_per_node, len(part.nodes) + spare
    if len(have.hosts) != count:
        problems.append(f"the plan needs {_count(count, 'node')}, the job has {_count(len(have.hosts), 'node')}")
    if set(have.tasks) != {size}:
        shown = " and ".join(str(count) for count in sorted(set(have.tasks)))
        problems.append(f"the plan needs {_count(size, 'task')} per node, the job has {shown}")
    if have.gpus >= 0 and have.gpus < gpus:
        problems.append(f"the plan needs {_count(gpus, 'GPU')} per node, the job has {have.gpus}")
    if part.feature is not None:
        without = [host for host in have.hosts if part.feature not in features.get(host, "").split(",")]
        if without:
            problems.append(f"the plan needs nodes with the feature {part.feature!r}, missing on {names(without)}")
    return problems


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
