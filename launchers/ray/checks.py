"""Checks whether a Ray cluster fits a plan, and runs the doctor's tasks on its nodes. Imports Ray."""

import ipaddress
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from launchers.command import JobPlan
from launchers.fit import check_graces, fit_result
from launchers.ray.gang import live_nodes
from launchers.ray.nodes import RayNode, assign, bundle_of_rank
from launchers.ray.submit import IN_JOB, STOP_WAIT
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ResourceError
from moe_dist.runtime.node.check_result import CheckResult, note, ok, warning
from moe_dist.runtime.rendezvous import HOST_VARIABLE

STOP_WAIT_DEFAULT = 3.0  # seconds, Ray's own default
MARGIN = 0.1  # fraction of Ray's grace period reserved for the driver; the ranks get the rest
START_SECONDS = 300.0  # seconds that a task may wait for its start, as other jobs may use the GPUs


def check_ray(
    plan: JobPlan, cluster: Cluster, parts: Mapping[str, str], save_seconds: float | None, env: Mapping[str, str]
) -> list[CheckResult]:
    """Checks that Ray has the plan's nodes, that no other machine can use Ray without a token, and that a stop leaves
    enough time for a save.

    Args:
        parts: Network address of each part of Ray, such as the dashboard.
        save_seconds: Measured seconds of a save; None if no save was measured.
    """
    answers, nodes = ok("scheduler", f"Ray {ray.__version__} answers"), live_nodes(cluster.exclude)
    chosen = _chosen(plan, cluster, nodes)
    fit = fit_result(chosen.problems, len(chosen.nodes), len(nodes), "Ray")
    return [answers, fit, check_exposure(parts), check_stop_grace(stop_grace(env), save_seconds)]


def run_on_nodes(
    plan: JobPlan, cluster: Cluster, module: str, argument: str, tasks_per_node: int, minutes: int
) -> Iterator[tuple[float, str]]:
    """Runs a module in Ray tasks that are pinned to nodes; yields the lines that the tasks print, each with its arrival
    time. Raises ResourceError if the cluster lacks the nodes, or a task did not start, failed, or exceeded its time."""
    chosen = _chosen(plan, cluster, live_nodes(cluster.exclude)).nodes
    if not chosen:
        raise ResourceError("the cluster lacks the nodes of the plan; the check `nodes` names them")
    gpus, world = (1 if tasks_per_node > 1 else 0), len(chosen) * tasks_per_node
    task: Any = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(_run)  # pyright: ignore
    hosts = [node.host for node in chosen]
    names = hosts if len(set(hosts)) == len(hosts) else [node.address for node in chosen]  # if host names are not unique
    waiting = []
    for rank in range(world):
        node, local = divmod(rank, tasks_per_node)
        own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": tasks_per_node}
        variables = cluster.network_variables | {name: str(value) for name, value in own.items()}
        variables["MOE_DIST_NODE_NAME"] = names[node]
        if rank == 0 and cluster.interface is None:
            variables[HOST_VARIABLE] = chosen[node].address
        pinned = NodeAffinitySchedulingStrategy(chosen[node].node_id, soft=False)  # soft=False: runs on no other node
        command = [cluster.python or sys.executable, "-m", module, argument]
        waiting.append(task.options(scheduling_strategy=pinned).remote(command, variables, 60.0 * minutes))
    deadline, problems = time.monotonic() + START_SECONDS + 60.0 * minutes, []
    while waiting:
        ended, waiting = ray.wait(waiting, num_returns=1, timeout=max(0.0, deadline - time.monotonic()))
        if not ended:
            for reference in waiting:
                ray.cancel(reference, force=True)  # without force, a blocked task would not end
            raise ResourceError(f"{len(waiting)} of {world} tasks did not end in {minutes} minutes")
        try:
            code, printed, complaint = ray.get(ended[0])
        except RayError as error:
            raise ResourceError(f"a task was lost: {str(error).splitlines()[0]}") from error
        yield from ((time.time(), line) for line in printed.splitlines())
        if code:
            problems.append(complaint.strip().rpartition("\n")[2] or f"exit code {code}")
    if problems:
        raise ResourceError(f"{len(problems)} of {world} tasks failed: {problems[0]}")


def _run(command: Sequence[str], variables: Mapping[str, str], seconds: float) -> tuple[int, str, str]:
    """Runs a command on a node; returns exit code, standard output and standard error."""
    env = {**os.environ, **variables}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=seconds, check=False)
    return done.returncode, done.stdout, done.stderr


def _chosen(plan: JobPlan, cluster: Cluster, nodes: Sequence[RayNode]) -> Any:
    """Assigns a Ray node to each planned node, as if no other job used the nodes."""
    idle = [replace(node, free=node.total) for node in nodes]
    return assign(plan, idle, bundle_of_rank(plan, cluster.cpus_per_rank))


def stop_grace(env: Mapping[str, str]) -> float | None:
    """Returns the seconds from `ray job stop` until Ray kills the driver. Returns None outside a job, because Ray does
    not kill the driver there."""
    if IN_JOB not in env:
        return None
    try:
        return float(env.get(STOP_WAIT, STOP_WAIT_DEFAULT))  # Ray's job agent reads the same variable
    except ValueError:
        return STOP_WAIT_DEFAULT


def check_stop_grace(grace: float | None, save_seconds: float | None) -> CheckResult:
    """Checks whether a stop leaves enough time for a save."""
    if grace is None:
        return note("stop grace", "the driver does not run in a Ray job, so Ray does not kill it after a stop")
    if grace <= STOP_WAIT_DEFAULT:
        fix = f'submit with --runtime-env-json \'{{"env_vars": {{"{STOP_WAIT}": "300"}}}}\''
        return warning("stop grace", f"`ray job stop` kills the driver after {grace:g} s ({STOP_WAIT})", fix)
    return check_graces({f"for the ranks after `ray job stop` ({STOP_WAIT})": grace * (1 - MARGIN)}, save_seconds)


def check_exposure(parts: Mapping[str, str]) -> CheckResult:
    """Checks whether other machines can reach Ray without a token. This would be dangerous, because Ray runs any code
    that a client sends. `parts` maps each part of Ray to its announced host:port."""
    found = listening(parts)
    beyond = [f"{part} at {each}" for part, listens in found.items() for each in listens if not _is_loopback(each)]
    if asks_for_token() or not beyond:
        return ok("exposure", "Ray listens only on the loopback, or requires a token")
    return warning(
        "exposure",
        f"Ray accepts connections from other machines ({', '.join(beyond)}) without a token: anyone who connects can run "
        "any code as you on every node",
        "start all of Ray with RAY_AUTH_MODE=token, or keep its ports inside a private network (docs/ray.md)",
    )


def listening(parts: Mapping[str, str]) -> dict[str, Sequence[str]]:
    """Returns the addresses at which parts of Ray listen. A part of Ray on this machine may listen at more addresses than
    it announces, so its addresses are read from the list of sockets. For a part on another machine, only the announced
    address is known."""
    found: dict[str, Sequence[str]] = {}
    connections = psutil.net_connections("tcp")  # scans /proc
    sockets = [each.laddr for each in connections if each.status == psutil.CONN_LISTEN and each.laddr]
    for part, address in parts.items():
        host, _, port = address.rpartition(":")
        found[part] = sorted({each.ip for each in sockets if each.port == int(port)}) or [host.strip("[]")]
    return found


def asks_for_token() -> bool:
    """Returns whether the connected Ray requires a token."""
    try:
        from ray._raylet import AuthenticationMode, get_authentication_mode  # pyright: ignore
    except ImportError:  # an older Ray without tokens
        return False
    return get_authentication_mode() == AuthenticationMode.TOKEN


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return address == "localhost"
