"""Runs a module on the planned nodes with one srun from the login node, and returns its output."""

import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence

from launchers.command import JobPlan
from launchers.slurm.script import container_prefix, interpreter, part_options, parts, pyxis_options, site_options
from launchers.snapshot import code_folder
from moe_dist.config.cluster import Cluster
from moe_dist.errors import ResourceError

START_SECONDS = 300.0  # seconds that the job may wait in the queue


def run_on_nodes(command: Sequence[str], *, minutes: int) -> Iterator[tuple[float, str]]:
    """Runs an `srun_command` with its time limit; yields the lines that the tasks print, each with its arrival time.

    Raises:
        ResourceError: Slurm refuses the job or does not start the job in time, or the job fails. The message has srun's
            errors.
    """
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=code_folder()
    ) as srun:
        assert srun.stdout is not None
        assert srun.stderr is not None
        said: list[str] = []
        listener = threading.Thread(target=lambda stream: said.extend(stream), args=(srun.stderr,), daemon=True)
        listener.start()  # a pipe of standard error that nobody reads would fill up and block srun
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
    """Returns an srun command that requests the plan's resources, GPUs included, so that Slurm chooses nodes as for the
    run. Each kind of node is one component of a heterogeneous job, as in the job of the run. Task 0 runs on node 0 of the
    plan.

    Args:
        module, argument: A task runs `python -m MODULE ARGUMENT` with RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.
        minutes: Time limit of the job.
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
            f"cd {shlex.quote(str(code))} || exit 78",  # cd, because pyxis starts the task in a folder of the image
            *(f"export {name}={shlex.quote(value)}" for name, value in cluster.network_variables.items()),
            *cluster.prelude,
            "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID",
            f"export LOCAL_WORLD_SIZE={tasks_per_node} PYTHONUNBUFFERED=1",
            f"exec {shlex.join(command)}",
        ]
    )
