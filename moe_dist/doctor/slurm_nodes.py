"""Runs a module of ours on the nodes that a plan wants, by Slurm: one srun from the login node, and no file in between."""

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from launchers.command import JobPlan, NodePlan
from moe_dist.config.cluster import Cluster
from moe_dist.errors import PlacementError

CLONE = Path(__file__).parents[2]
START_SECONDS = 300.0  # how long the job may wait in the queue


def run_on_nodes(
    plan: JobPlan, cluster: Cluster, module: str, argument: str, *, tasks_per_node: int, minutes: int
) -> Iterator[tuple[float, str]]:
    """Lines that the tasks print, each with the Unix time when it was heard. The first task is on the first node of the
    plan. The job asks for what the plan's nodes have, GPUs included, so that it lands where the run would.

    Args:
        module, argument: `python -m MODULE ARGUMENT`, with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE set.
        minutes: Time limit of the job.

    Raises:
        PlacementError: Slurm refuses the job, does not start it in time, or it does not end; with srun's words.
    """
    command = srun_command(plan, cluster, module, argument, tasks_per_node=tasks_per_node, minutes=minutes)
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=CLONE
    ) as srun:
        assert srun.stdout is not None
        assert srun.stderr is not None
        said: list[str] = []
        listener = threading.Thread(target=lambda stream: said.extend(stream), args=(srun.stderr,), daemon=True)
        listener.start()
        # TERM makes srun give back its allocation, also one that it still waits for.
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
        raise PlacementError(f"srun ended with {code}: {' / '.join(map(str.strip, last))}")


def srun_command(
    plan: JobPlan, cluster: Cluster, module: str, argument: str, *, tasks_per_node: int, minutes: int
) -> list[str]:
    """One srun; the nodes of each kind are a component of their own, in the order of the plan."""
    kinds: dict[str | None, list[NodePlan]] = {}
    for node in plan.nodes:
        kinds.setdefault(node.feature, []).append(node)
    task = ["bash", "-c", _script(cluster, module, argument, tasks_per_node)]
    command = ["srun"]
    for number, (feature, nodes) in enumerate(kinds.items()):
        command += [":"] if number else []
        command += [*_component(plan, cluster, feature, len(nodes), tasks_per_node), f"--time={minutes}", *task]
    return command


def _component(plan: JobPlan, cluster: Cluster, feature: str | None, nodes: int, tasks_per_node: int) -> list[str]:
    site = {"account": cluster.account, "partition": cluster.partition, "qos": cluster.qos, "constraint": feature}
    options = [f"--{name}={value}" for name, value in site.items() if value is not None]
    options += [f"--nodes={nodes}", f"--ntasks={nodes * tasks_per_node}", f"--ntasks-per-node={tasks_per_node}"]
    if cluster.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={cluster.cpus_per_rank * plan.ranks_per_node // tasks_per_node}")
    if plan.gpus_per_node:
        kind = f"{cluster.gpus.type}:" if cluster.gpus.type is not None else ""
        gres = f"--gres=gpu:{kind}{plan.gpus_per_node}"
        options.append(gres if cluster.gpus.syntax == "gres" else f"--gpus-per-node={kind}{plan.gpus_per_node}")
    return [*options, "--job-name=moe_dist-doctor", "--input=none", "--kill-on-bad-exit=0", "--quiet"]


def _script(cluster: Cluster, module: str, argument: str, tasks_per_node: int) -> str:
    """What a task runs: the cluster file's prelude, then Python."""
    python = cluster.python or (sys.executable if os.access(sys.executable, os.X_OK) else "python3")
    lines: Sequence[str] = [
        *cluster.prelude,
        "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
        f"export LOCAL_WORLD_SIZE={tasks_per_node} PYTHONUNBUFFERED=1",
        *([f"export GLOO_SOCKET_IFNAME={cluster.interface}"] if cluster.interface else []),
        f"exec {shlex.quote(python)} -m {module} {shlex.quote(argument)}",
    ]
    return "\n".join(lines)
