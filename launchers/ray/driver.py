"""The driver of a run on Ray: connects to the cluster, warns of security problems, and runs the attempts."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import ray

from launchers.attempts import begin_logs, run_attempts
from launchers.command import JobPlan, rank_commands
from launchers.rank_tracker import Outcome, ShutdownTimeouts
from launchers.ray.checks import MARGIN, check_exposure, check_stop_grace, stop_grace
from launchers.ray.gang import gather_gang
from launchers.ray.job import RayJob
from launchers.ray.nodes import bundle_of_rank
from launchers.ray.rank import WorkerInfo
from launchers.ray.submit import IN_JOB
from launchers.snapshot import code_folder
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ResourceError
from moe_dist.runtime.place import LABELS
from moe_dist.runtime.rendezvous import HOST_VARIABLE
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS, StopSignals
from moe_dist.runtime.status import measured_save_seconds

CONNECT_SECONDS = 10.0  # timeout of the connection to Ray's head node
SETTLE_SECONDS = 5.0  # time limit for missing nodes before the first attempt
LAST_LINES_SECONDS = 1.0  # seconds within which Ray forwards rank 0's last output
REPLACE_SECONDS = 300.0  # time limit for missing nodes before a restart


def drive(job: RayJob, signals: StopSignals) -> int:
    """Connects to Ray and runs attempts as `run_attempts` does; returns the last attempt's exit code. Raises
    ResourceError if there is no cluster, and the errors of `gather_gang`."""
    grace = stop_grace(os.environ)
    with connected(os.environ) as parts:
        signals.renew()  # ray.init has replaced the signal handlers
        for result in (check_stop_grace(grace, measured_save_seconds(job.folder.logs)), check_exposure(parts)):
            if result.is_problem:
                print(f"{'!' * 100}\nWARNING: {result}\n{'!' * 100}", file=sys.stderr, flush=True)
        job.folder.prepare()  # made before the actors start, because each actor checks that it sees the folder

        faulty: set[str] = set()  # Ray's ids of nodes at fault in earlier attempts
        nodes: list[str] = []  # Ray's id of each rank's node
        seconds = grace * (1 - MARGIN) if grace else DEFAULT_GRACE_SECONDS

        def run(restarts: int, attempt_id: str) -> Outcome:
            outcome, nodes[:] = _attempt(job, restarts, attempt_id, signals, seconds, faulty)
            return outcome

        limit, blame = job.max_restarts, lambda rank: faulty.add(nodes[rank])
        code = run_attempts(job.folder, run, signals, prefix="ray", max_restarts=limit, blame=blame)
        time.sleep(LAST_LINES_SECONDS)  # waits until Ray has forwarded the last output of rank 0
    return code


def _attempt(
    job: RayJob, restarts: int, attempt_id: str, signals: StopSignals, grace_seconds: float, faulty: Collection[str]
) -> tuple[Outcome, list[str]]:
    """Runs one attempt. Uses the nodes in `faulty` only if the other nodes do not suffice. Returns the attempt's outcome,
    and Ray's id of each rank's node."""
    wait = REPLACE_SECONDS if restarts else SETTLE_SECONDS
    gang = gather_gang(
        job.launch.job,
        bundle_of_rank(job.launch.job, job.cluster.cpus_per_rank),
        [str(path) for path in (job.launch.config, job.folder.logs)],
        str(job.data),
        together=job.together,
        exclude=job.cluster.exclude,
        avoid=faulty,
        wait_seconds=wait if job.wait_seconds is None else job.wait_seconds,
        signals=signals,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    try:
        print(gang.job.table([gang.node(node.ranks[0]).address for node in gang.job.nodes]), flush=True)
        begin_logs(job.folder, gang.job.world_size, attempt_id)
        attempt = {"attempt": restarts, "attempt_id": attempt_id, "grace_seconds": grace_seconds}
        planned = rank_commands(replace(job.launch, job=gang.job, hosts=gang.hosts, **attempt))
        site = [job.variables | site_variables(job.cluster, gang.workers, command.rank) for command in planned]
        own = worker_variables(gang.job, gang.workers)
        commands = [replace(each, env=site[each.rank] | own[each.rank] | each.env) for each in planned]
        logs = [job.folder.log_of(command.rank) for command in commands]
        outcome = gang.run(commands, logs, signals, ShutdownTimeouts(stop=grace_seconds * (1 + MARGIN / 2)))
        return outcome, [gang.node(rank).node_id for rank in range(gang.job.world_size)]
    finally:
        gang.close()  # kills the actors, even after an error


def worker_variables(plan: JobPlan, workers: Sequence[WorkerInfo]) -> list[dict[str, str]]:
    """Returns the environment variables of each rank: the labels of its node, and the GPUs of all ranks on the node. A
    rank must see all these GPUs, ordered by local rank, so that peer-to-peer access between them works."""
    variables = []
    for rank, worker in enumerate(workers):
        variables.append({LABELS: json.dumps(dict(worker.labels), sort_keys=True)})
        if gpus := [gpu for other in plan.node_of(rank).ranks for gpu in workers[other].gpus]:
            variables[-1]["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return variables


def site_variables(cluster: Cluster, workers: Sequence[WorkerInfo], rank: int) -> dict[str, str]:
    """Returns the cluster file's `network_variables`, and for rank 0 also the address at which it listens: its node's Ray
    address, unless the file names an interface."""
    host = {HOST_VARIABLE: workers[0].host} if rank == 0 and cluster.interface is None else {}
    return cluster.network_variables | host


@contextmanager
def connected(env: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Connects to this process's Ray cluster. Yields the network addresses of Ray's GCS and dashboard. Raises ResourceError
    if there is no cluster."""
    # Ray copies the code of a job to the nodes. Outside of a job, `working_dir` makes Ray copy this clone.
    shipped = {"working_dir": str(code_folder())} if IN_JOB not in env else {}
    address = env.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # tests the connection first, because ray.init retries for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        # The address makes Ray join a running cluster; without an address Ray would start a cluster on this machine.
        context = ray.init(address=address, runtime_env=shipped, logging_level=logging.WARNING)
    except OSError as error:
        raise ResourceError(
            f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start one with `ray start`, set RAY_ADDRESS, or "
            "submit to one with --submit ADDRESS",
            see="docs/ray.md",
        ) from error
    addresses = {"GCS": ray.get_runtime_context().gcs_address, "dashboard": context.dashboard_url}
    try:
        yield {part: address for part, address in addresses.items() if address}
    finally:
        ray.shutdown()  # frees the resources of this job
