"""Checks whether a Slurm cluster (nodes, time limit, stop signals) fits a plan; runs the doctor's tasks on its nodes."""

import re
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from launchers.command import JobPlan
from launchers.fit import Offer, Want, check_graces, fit_result, unmet
from launchers.launcher import Examination
from launchers.slurm.nodes import SlurmError, ask
from launchers.slurm.script import container_prefix, interpreter, part_options, parts, pyxis_options, site_options
from launchers.snapshot import code_folder
from moe_dist.config.cluster import Cluster, seconds_of
from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.node.check_result import CheckResult, error, note, ok
from moe_dist.runtime.node.facts import nearest

START_SECONDS = 300.0  # seconds that the job may wait in the queue
# States in which a node can run jobs, now or after other jobs end
UP = frozenset(("idle", "mixed", "allocated", "completing", "planned", "reserved"))
Ask = Callable[..., str]  # takes the words of a Slurm command; returns the output


def check_slurm(plan: JobPlan, cluster: Cluster, save_seconds: float | None, *, ask: Ask = ask) -> list[CheckResult]:
    """Checks that Slurm answers, has the plan's nodes and allows the time limit, and that a stop leaves time for a save."""
    try:
        offers = [offer for offer in read_offers(cluster.partition, ask) if offer.name not in cluster.exclude]
        limit = _partition_limit(cluster.partition, ask)
        settings = dict(re.findall(r"^(\w+)\s*= (.*)$", ask("scontrol", "show", "config"), re.MULTILINE))
    except SlurmError as failed:
        return [error("scheduler", f"Slurm: {failed}", "check slurmctld, or run this on a login node of the cluster")]
    where = where_of(cluster)
    problems = unmet(wants(plan, cluster), offers, word="feature", where=where)
    return [
        ok("scheduler", f"Slurm {settings.get('SLURM_VERSION', '').strip()} answers"),
        fit_result(problems, len(plan.nodes), len(offers), where),
        check_time(cluster.time, limit, where),
        check_grace(cluster, settings, save_seconds),
    ]


def where_of(cluster: Cluster) -> str:
    """Names the part of the cluster in which jobs run."""
    return f"partition {cluster.partition!r}" if cluster.partition else "the default partition"


def wants(plan: JobPlan, cluster: Cluster) -> list[Want]:
    """Returns the requirements of the planned nodes in Slurm's terms: features, GPUs and CPUs."""
    found = []
    for node in plan.nodes:
        amounts: dict[str, float] = {"GPU": plan.gpus_per_node} if plan.gpus_per_node else {}
        amounts["CPU"] = len(node.ranks) * (cluster.cpus_per_rank or 1)
        traits = frozenset([node.feature] if node.feature is not None else [])
        found.append(Want(node, traits, amounts))
    return found


def read_offers(partition: str | None, ask: Ask = ask) -> list[Offer]:
    """Returns the nodes of a partition, or of the default partition. Raises SlurmError if Slurm does not answer."""
    offers = []
    for line in ask(*_sinfo(partition), "--Node", "--format=%N|%T|%f|%c|%G|%P").splitlines():
        name, state, features, cpus, gres, of = (part.strip() for part in line.split("|"))
        if partition is None and not of.endswith("*"):  # a star ends the name of the default partition
            continue
        traits = frozenset() if features == "(null)" else frozenset(features.split(","))
        amounts = {"CPU": float(cpus), "GPU": float(gpus_of(gres))}
        # A node whose state has a suffix is not usable: it does not respond (*), reboots (@) or is powered down (~).
        offers.append(Offer(name, traits, amounts, "" if state in UP else state))
    return offers


def gpus_of(gres: str) -> int:
    """Returns the number of GPUs in a list of generic resources, such as 'gpu:2' or 'gpu:h100:8(S:0-1),nic:1'."""
    return sum(int(number) for number in re.findall(r"(?:^|,)gpu:(?:[A-Za-z][^:,(]*:)?(\d+)", gres))


def check_time(asked: str, limit: str | None, where: str) -> CheckResult:
    """Compares the time limit in the cluster file with the limit of the partition."""
    if limit is None:
        return note("time limit", f"{where} shows no limit; the job requests {asked}")
    if seconds_of(asked) > seconds_of(limit):
        text = f"the cluster file has time: {asked}, but {where} allows {limit}"
        return error("time limit", f"{text}; the job would wait forever or be refused", "lower it", kind=ConfigError)
    return ok("time limit", f"{asked}; {where} allows {limit}")


def check_grace(cluster: Cluster, settings: dict[str, str], save_seconds: float | None) -> CheckResult:
    """Compares the seconds of a save with Slurm's grace periods, at the time limit and on preemption. A grace period
    is the time from a stop signal until Slurm kills the ranks."""
    preempts = settings.get("PreemptType", "(null)").strip() not in ("(null)", "preempt/none", "")
    kill_wait = re.match(r"\d+", settings.get("KillWait", ""))
    graces = {"before the time limit (signal_seconds)": float(cluster.signal_seconds)}
    if preempts and kill_wait:
        graces["on preemption (KillWait)"] = float(kill_wait[0])
    return check_graces(graces, save_seconds)


def _partition_limit(partition: str | None, ask: Ask) -> str | None:
    lines = ask(*_sinfo(partition), "--format=%P|%l").splitlines()
    limits = [line.split("|")[1].strip() for line in lines if partition or line.split("|")[0].strip().endswith("*")]
    return limits[0] if limits else None


def _sinfo(partition: str | None) -> list[str]:
    return ["sinfo", "--noheader", *([f"--partition={partition}"] if partition else [])]


def run_on_nodes(
    asked: Examination, module: str, argument: str, tasks_per_node: int, minutes: int
) -> Iterator[tuple[float, str]]:
    """Runs `python -m MODULE ARGUMENT` on the planned nodes; yields the lines that the tasks print, each with its arrival
    time. Raises the errors of `run_srun`."""
    visible = [str(nearest(Path(asked.config.run.root))), str(Path(asked.config.data.path).absolute())]
    size = {"tasks_per_node": tasks_per_node, "minutes": minutes}
    return run_srun(srun_command(asked.plan, asked.cluster, module, argument, visible=visible, **size), minutes=minutes)


def run_srun(command: Sequence[str], *, minutes: int) -> Iterator[tuple[float, str]]:
    """Runs an `srun_command` with its time limit; yields the lines that the tasks print, each with its arrival time. Raises
    ResourceError if Slurm refuses the job or does not start the job in time, or the job fails. The message has srun's
    errors."""
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=code_folder()
    ) as srun:
        assert srun.stdout is not None
        assert srun.stderr is not None
        said: list[str] = []
        listener = threading.Thread(target=lambda stream: said.extend(stream), args=(srun.stderr,), daemon=True)
        listener.start()  # if nobody read standard error, its pipe would fill up and block srun
        # SIGTERM makes srun release its allocation, or withdraw its request if the job still waits in the queue.
        timer = threading.Timer(START_SECONDS + 60.0 * minutes, srun.send_signal, (signal.SIGTERM,))
        timer.start()
        try:
            for line in srun.stdout:
                yield time.time(), line
        finally:
            timer.cancel()
            if srun.poll() is None:
                srun.send_signal(signal.SIGTERM)
        code = srun.wait()
        listener.join(5.0)
    if code:
        last = [line.strip() for line in said if line.startswith("srun: error") or "rror" in line][-3:] or said[-1:]
        raise ResourceError(f"srun ended with {code}: {' / '.join(map(str.strip, last))}")


def srun_command(
    plan: JobPlan,
    cluster: Cluster,
    module: str,
    argument: str,
    *,
    tasks_per_node: int,
    minutes: int,
    visible: Sequence[str] = (),
) -> list[str]:
    """Returns an srun command that requests the plan's resources including GPUs, so that Slurm chooses the same kinds of
    nodes as for the run. Each kind of node is one component of a heterogeneous job, as in the run's own job. Task 0 runs
    on node 0 of the plan.

    Args:
        module, argument: A task runs `python -m MODULE ARGUMENT` with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
        visible: Further folders of the node, which the site's container mounts at the same paths.
    """
    visible = list(dict.fromkeys([str(code_folder()), *visible]))
    task = ["bash", "-c", _script(cluster, module, argument, tasks_per_node, visible)]
    # This short job has its own time limit, and needs no stop signal before this limit.
    site = [option for option in site_options(cluster) if not option.startswith(("--time", "--signal"))]
    common = [*site, f"--time={minutes}", "--job-name=moe_dist-doctor", "--input=none", "--kill-on-bad-exit=0", "--quiet"]
    common += [*cluster.srun_options, *pyxis_options(cluster, visible)]
    command = ["srun"]
    for number, part in enumerate(parts(plan)):
        kind = [option for option in part_options(part, plan, cluster) if not option.startswith(("--n", "--cpus"))]
        size = [f"--nodes={len(part.nodes)}", f"--ntasks={len(part.nodes) * tasks_per_node}"]
        size.append(f"--ntasks-per-node={tasks_per_node}")
        if cluster.cpus_per_rank is not None:
            size.append(f"--cpus-per-task={cluster.cpus_per_rank * part.ranks_per_node // tasks_per_node}")
        command += [*([":"] if number else []), *kind, *size, *common, *task]
    return command


def _script(cluster: Cluster, module: str, argument: str, tasks_per_node: int, visible: Sequence[str]) -> str:
    """Returns the shell text of a task: the site's variables and prelude, then Python in the site's container."""
    code = code_folder()
    command = [*container_prefix(cluster, visible, code), interpreter(cluster), "-m", module, argument]
    return "\n".join(
        [
            f"cd {shlex.quote(str(code))} || exit 78",  # because pyxis starts the task in a folder of the image
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.network_variables.items()),
            *cluster.prelude,
            "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
            f"export LOCAL_WORLD_SIZE={tasks_per_node} PYTHONUNBUFFERED=1",
            f"exec {shlex.join(command)}",
        ]
    )
