"""Checks a Slurm cluster (nodes, time limit, stop signals) against a plan, with sinfo and scontrol. Imports no torch."""

import re
from collections.abc import Callable

from launchers.command import JobPlan, rank_ranges
from launchers.doctor.fit import Offer, Want, check_fit
from launchers.slurm.nodes import SlurmError, ask
from moe_dist.config.cluster import Cluster, seconds_of
from moe_dist.errors import ConfigError
from moe_dist.runtime.node.check_result import CheckResult, error, note, ok, warning

# States of nodes in which jobs run, now or after other jobs end
UP = frozenset(("idle", "mixed", "allocated", "completing", "planned", "reserved"))
Ask = Callable[..., str]  # words of a Slurm command -> output of the command


def check_slurm(plan: JobPlan, cluster: Cluster, save_seconds: float | None, *, ask: Ask = ask) -> list[CheckResult]:
    """Checks that Slurm answers and has the plan's nodes. Also checks the time limit, and whether a stop leaves enough time
    for a save."""
    try:
        offers = [offer for offer in read_offers(cluster.partition, ask) if offer.name not in cluster.exclude]
        limit = _partition_limit(cluster.partition, ask)
        settings = dict(re.findall(r"^(\w+)\s*= (.*)$", ask("scontrol", "show", "config"), re.MULTILINE))
    except SlurmError as failed:
        return [error("scheduler", f"Slurm: {failed}", "check slurmctld, or run this on a login node of the cluster")]
    where = f"partition {cluster.partition!r}" if cluster.partition else "the default partition"
    return [
        ok("scheduler", f"Slurm {settings.get('SLURM_VERSION', '').strip()} answers"),
        check_fit(wants(plan, cluster), offers, trait_word="feature", where=where),
        check_time(cluster.time, limit, where),
        check_grace(cluster, settings, save_seconds),
    ]


def wants(plan: JobPlan, cluster: Cluster) -> list[Want]:
    """Returns the requirements of the planned nodes in Slurm's terms: features, GPUs and CPUs."""
    found = []
    for node in plan.nodes:
        amounts: dict[str, float] = {"GPU": plan.gpus_per_node} if plan.gpus_per_node else {}
        amounts["CPU"] = len(node.ranks) * (cluster.cpus_per_rank or 1)
        traits = frozenset([node.feature] if node.feature is not None else [])
        found.append(Want(rank_ranges(node.ranks), traits, amounts))
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
        offers.append(Offer(name, state, state in UP, traits, amounts))
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


def check_graces(graces: dict[str, float], save_seconds: float | None) -> CheckResult:
    """Compares every grace period with the measured save time."""
    shown = ", ".join(f"{seconds:g} s {when}" for when, seconds in graces.items())
    if save_seconds is None:
        return note("stop grace", f"{shown}; this run has no save yet to compare with")
    short = {when: seconds for when, seconds in graces.items() if seconds < save_seconds}
    if short:
        when, seconds = min(short.items(), key=lambda each: each[1])
        text = f"{seconds:g} s {when}, but the last saves took up to {save_seconds:.1f} s"
        fix = "increase it, or save more often (checkpoint.every): a stop would lose the steps since the last checkpoint"
        return warning("stop grace", text, fix)
    return ok("stop grace", f"{shown}; the last saves took up to {save_seconds:.1f} s")


def _partition_limit(partition: str | None, ask: Ask) -> str | None:
    lines = ask(*_sinfo(partition), "--format=%P|%l").splitlines()
    limits = [line.split("|")[1].strip() for line in lines if partition or line.split("|")[0].strip().endswith("*")]
    return limits[0] if limits else None


def _sinfo(partition: str | None) -> list[str]:
    return ["sinfo", "--noheader", *([f"--partition={partition}"] if partition else [])]
