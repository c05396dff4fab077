"""The driver of a run on Ray: connects, warns of what is unsafe, and carries attempts out until one is the last."""

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import ray

from launchers.attempts import begin_logs, until_it_ends
from launchers.command import JobPlan, LaunchPlan, published_rendezvous, rank_commands
from launchers.ending import Outcome, ShutdownTimeouts
from launchers.ray.exposure import asks_for_token, exposure_text, listening
from launchers.ray.gang import gather_gang
from launchers.ray.job import RayJob
from launchers.ray.nodes import bundle_of_rank
from launchers.ray.rank import WorkerInfo
from launchers.ray.submit import STOP_WAIT
from launchers.snapshot import code_folder
from launchers.supervise import StopSignals
from moe_dist.config.cluster import Cluster
from moe_dist.errors import PlacementError
from moe_dist.runtime.place import LABELS
from moe_dist.runtime.rendezvous import HOST_VARIABLE
from moe_dist.runtime.save_time import measured_save_seconds
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # set by Ray's job API for what it starts
CONNECT_SECONDS = 10.0  # for the head to take a connection
STOP_WAIT_DEFAULT = 3.0  # seconds, Ray's own
MARGIN = 0.1  # share of Ray's grace that is left for the driver when that of the ranks is over
SETTLE_SECONDS = 5.0  # at the first start: a node that is not there by then will not come
LAST_LINES_SECONDS = 1.0  # that Ray takes to bring what rank 0 has printed here
REPLACE_SECONDS = 300.0  # after a failure: a node that was lost is being replaced


def drive(job: RayJob, signals: StopSignals) -> int:
    """Runs attempts until one is the last; returns its verdict.

    Raises:
        PlacementError: there is no cluster to connect to, or it does not have the nodes.
        ConfigError, StoppedError: as `gather_gang`.
    """
    grace = stop_grace(os.environ)
    with connected(os.environ, job.forwarded) as parts:
        signals.renew()
        graces = grace_text(grace, measured_save_seconds(job.folder.logs))
        for text in filter(None, (graces, exposure_text(listening(parts), token=asks_for_token()))):
            print(text, file=sys.stderr, flush=True)
        job.folder.prepare()

        def run(restarts: int, attempt_id: str) -> tuple[Outcome, list[int]]:
            return _attempt(job, restarts, attempt_id, signals, grace * (1 - MARGIN) if grace else DEFAULT_GRACE_SECONDS)

        code = until_it_ends(job.folder, run, signals, prefix="ray", max_restarts=job.max_failures, option="--max-failures")
        time.sleep(LAST_LINES_SECONDS)
    return code


def _attempt(
    job: RayJob, restarts: int, attempt_id: str, signals: StopSignals, grace_seconds: float
) -> tuple[Outcome, list[int]]:
    """How the ranks of one attempt ended, and where it begins in their logs."""
    wait = REPLACE_SECONDS if restarts else SETTLE_SECONDS
    gang = gather_gang(
        job.plan,
        bundle_of_rank(job.plan, job.cluster.cpus_per_rank),
        [str(path) for path in (job.config, job.folder.logs, job.data)],
        together=job.together,
        wait_seconds=wait if job.wait_seconds is None else job.wait_seconds,
        signals=signals,
        say=lambda text: print(text, file=sys.stderr, flush=True),
    )
    try:
        print(seats_table(job.plan, gang.seats), flush=True)
        offsets = begin_logs(job.folder, job.plan.world_size, attempt_id)
        plan = LaunchPlan(
            config=job.config,
            overrides=job.overrides,
            job=job.plan,
            rendezvous=published_rendezvous(),
            attempt=restarts,
            attempt_id=attempt_id,
            grace_seconds=grace_seconds,
            threads=job.cluster.cpus_per_rank,
            python=job.cluster.python or "",  # that of its actor
            program=job.program,
            hosts=gang.hosts,
        )
        commands = [
            replace(command, env={**site_variables(job.cluster, gang.seats, command.rank), **worker, **command.env})
            for command, worker in zip(rank_commands(plan), seat_variables(job.plan, gang.seats), strict=True)
        ]
        gang.start(commands, [job.folder.log_of(command.rank) for command in commands])
        return gang.see_through(signals, ShutdownTimeouts(stop=grace_seconds * (1 + MARGIN / 2))), offsets
    finally:
        gang.close()


def seat_variables(plan: JobPlan, seats: Sequence[WorkerInfo]) -> list[dict[str, str]]:
    """For each rank what it finds where it is: the labels of its node; and the GPUs that Ray gave to all ranks of the node,
    in the order of their local ranks, so that a rank's own has its local rank as index and peers can reach it directly."""
    variables = []
    for rank, worker in enumerate(seats):
        found = {LABELS: json.dumps(dict(worker.labels), sort_keys=True)}
        gpus = [gpu for other in plan.node_of(rank).ranks for gpu in seats[other].gpus]
        if gpus:
            found["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        variables.append(found)
    return variables


def site_variables(cluster: Cluster, seats: Sequence[WorkerInfo], rank: int) -> dict[str, str]:
    """What the cluster file says of the network. Without an interface rank 0 listens at the address by which Ray's nodes
    reach each other."""
    variables = {name: each.value for name, each in cluster.nccl.items()}
    if cluster.interface is not None:
        return {**variables, "GLOO_SOCKET_IFNAME": cluster.interface, "NCCL_SOCKET_IFNAME": cluster.interface}
    return {**variables, **({HOST_VARIABLE: seats[0].host} if rank == 0 else {})}


def seats_table(plan: JobPlan, seats: Sequence[WorkerInfo]) -> str:
    """A line for each rank: where it is, and the experts that live on it."""
    lines = []
    for rank, worker in enumerate(seats):
        labels = ",".join(
            f"{name}={value}" for name, value in sorted(worker.labels.items()) if not name.startswith("ray.io/")
        )
        gpus = f"  GPU {','.join(worker.gpus)}" if worker.gpus else ""
        experts = f"  experts of {', '.join(plan.groups[rank])}" if plan.groups and plan.groups[rank] else ""
        lines.append(f"rank {rank}  {worker.host}  {labels or '-'}{gpus}{experts}")
    return "\n".join(lines)


@contextmanager
def connected(env: Mapping[str, str], forwarded: Sequence[str] = ()) -> Iterator[dict[str, str]]:
    """Joins the cluster that this process belongs to. Outside of a job this clone is shipped to the nodes, as a job would.

    Args:
        forwarded: Variables of this process that the ranks get as well; in a job its runtime environment says that.

    Returns:
        The address of each part of Ray that others may reach.

    Raises:
        PlacementError: there is no cluster.
    """
    shipped = (
        {} if IN_A_JOB in env else {"working_dir": str(code_folder()), "env_vars": {name: env[name] for name in forwarded}}
    )
    address = env.get("RAY_ADDRESS", "auto")
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself goes on trying for minutes
            socket.create_connection((host, int(port)), CONNECT_SECONDS).close()
        context = ray.init(address=address, runtime_env=shipped, logging_level=logging.WARNING)
    except OSError as error:
        raise PlacementError(
            f"no Ray cluster at {address} ({str(error).splitlines()[0]}); start one with `ray start`, set RAY_ADDRESS, or "
            "submit to one with --submit ADDRESS",
            see="docs/ray.md",
        ) from error
    addresses = {"GCS": ray.get_runtime_context().gcs_address, "dashboard": context.dashboard_url}
    try:
        yield {part: address for part, address in addresses.items() if address}
    finally:
        ray.shutdown()


def stop_grace(env: Mapping[str, str]) -> float | None:
    """Seconds from `ray job stop` until Ray kills the driver; None where it is no job, and nobody does."""
    if IN_A_JOB not in env:
        return None
    try:
        return float(env.get(STOP_WAIT, STOP_WAIT_DEFAULT))
    except ValueError:
        return STOP_WAIT_DEFAULT


def grace_text(grace: float | None, save_seconds: float | None) -> str:
    """The grace beside what a save has taken; a warning where it is too short."""
    if grace is None:
        return ""
    saves = "this run has saved nothing yet" if save_seconds is None else f"its last saves took up to {save_seconds:.1f} s"
    text = f"a stop may take {grace:g} s ({STOP_WAIT}); {saves}"
    if grace > STOP_WAIT_DEFAULT and (save_seconds is None or save_seconds <= grace * (1 - MARGIN)):
        return text
    advice = f'submit with --runtime-env-json \'{{"env_vars": {{"{STOP_WAIT}": "300"}}}}\''
    return f"WARNING: {text}: `ray job stop` will kill the run before it has saved; {advice}"
