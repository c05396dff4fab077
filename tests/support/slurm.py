"""Runs a real Slurm of a few nodes on this machine (slurm_cluster.sh), and the jobs of a test."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moe_dist.runtime.run_folder import RunFolder
from tests.support.shape import Shape

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "support" / "slurm_cluster.sh"
PACKAGES = "slurmctld slurmd slurm-client munge environment-modules iproute2 util-linux"
BUSY_SECONDS = 600.0  # limit for any action of four ranks, for a busy machine
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
LATE_SECONDS = 30.0  # limit for a condition after the job's end, or while Slurm holds the job


class SlurmCluster:
    """A cluster whose nodes each have a network, a host name and a process tree.

    Args:
        folder: Folder of the cluster's state. Its path must be short, because it contains sockets.
        nodes: Number of nodes. Without a shape their names are node1 .. nodeN.
        shape: Names, limits and settings of four nodes.
        features: Features of each node; the last one repeats.
        gpus: Number of fake GPUs of each node.
    """

    def __init__(self, folder: Path, *, nodes: int, features: str = "", gpus: int = 0, shape: Shape | None = None) -> None:
        if shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
            raise AssertionError(f"Slurm is not installed: apt-get install --no-install-recommends {PACKAGES}")
        self.folder, self._nodes = folder, nodes
        settings = {"SLURM_CI_DIR": str(folder), "SLURM_CI_FEATURES": features, "SLURM_CI_GPUS": str(gpus)}
        settings |= {} if shape is None else shape.variables()
        self._env = {
            name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_", "MOE_", "OMP_"))
        }
        self._env |= {**settings, "SLURM_CONF": str(folder / "slurm.conf")}

    def __enter__(self) -> "SlurmCluster":
        self._script("start", str(self._nodes))
        return self

    def __exit__(self, *error: object) -> None:
        self._script("stop")

    def kill_node(self, name: str) -> None:
        """Kills the node with all its processes at once, and tells Slurm."""
        self._script("kill-node", name, "now")

    def start_node(self, name: str) -> None:
        self._script("start-node", name)

    def logs(self) -> str:
        return self._script("logs", "30")

    @property
    def variables(self) -> dict[str, str]:
        """Returns the environment of a user of the cluster."""
        return self._env

    def run(self, *command: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs a command in the environment of a user."""
        env = {**self._env, **variables}
        return subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )

    def launch(self, *arguments: str, **variables: str) -> "SlurmJob":
        """Runs `python -m launchers.slurm ...`, which must succeed."""
        done = self.run(sys.executable, "-m", "launchers.slurm", *arguments, cwd=ROOT, **variables)
        assert done.returncode == 0, done.stderr
        printed = dict(line.split(maxsplit=1) for line in done.stdout.splitlines()[:4])
        return SlurmJob(self, printed["job"], Path(printed["output"]))

    def sbatch(self, *arguments: str, output: Path, cwd: Path = ROOT, **variables: str) -> "SlurmJob":
        """Runs `sbatch ...`, which must succeed. Its output goes to `output`."""
        done = self.run("sbatch", "--parsable", f"--output={output}", *arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return SlurmJob(self, done.stdout.strip(), output)

    def scontrol(self, *arguments: str) -> str:
        done = self.run("scontrol", *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _script(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(SCRIPT), *arguments], env=self._env, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


class SlurmJob:
    """One job.

    Args:
        number: Slurm's number of the job, with `_task` for a task of an array.
        output: File of the job's output.
    """

    def __init__(self, cluster: SlurmCluster, number: str, output: Path) -> None:
        self.cluster, self.number, self.output = cluster, number, output

    @property
    def said(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def field(self, name: str) -> str:
        """Returns a field of `scontrol show job`, such as JobState. Of a heterogeneous job it reads the first component."""
        match = re.search(rf"\b{name}=(\S+)", self.cluster.scontrol("--oneliner", "show", "job", self.number))
        assert match is not None, name
        return match[1]

    @property
    def hosts(self) -> list[str]:
        return self.cluster.scontrol("show", "hostnames", self.field("NodeList")).split()

    @property
    def code(self) -> int:
        return int(self.field("ExitCode").partition(":")[0])

    def wait_for(self, condition: Callable[[], bool], what: str, *, seconds: float = BUSY_SECONDS) -> None:
        """Waits until `condition` holds. Fails after `seconds`, or if the condition does not hold within LATE_SECONDS after
        the job's end. The error shows the state of the cluster."""
        began = moved = look = time.monotonic()
        while not condition():
            now = time.monotonic()
            if now >= look:  # a call of scontrol costs more than a read of a file
                look = now + 2.0
                moved = moved if self.field("JobState") in OVER or self.field("Reason").startswith("JobHeld") else now
            if now - began > seconds or now - moved > LATE_SECONDS:
                raise AssertionError(
                    f"job {self.number} is not {what}\n{self.cluster.scontrol('show', 'job', self.number)}\n"
                    f"{self.cluster.scontrol('show', 'node')}\n{self.said}\n{self.cluster.logs()}"
                )
            time.sleep(0.1)

    def end(self) -> int:
        """Waits for the job's end. Returns its exit code."""
        self.wait_for(lambda: self.field("JobState") in OVER, "over")
        return self.code

    def wait_for_requeue(self, restarts: int = 1) -> None:
        self.wait_for(lambda: int(self.field("Restarts")) >= restarts, f"requeued {restarts} times")

    def cancel(self) -> None:
        self.cluster.run("scancel", self.number)
        self.end()

    def processes(self, *, rank: int | None = None) -> list[int]:
        """Returns the processes of the job or of one rank on all nodes, except Slurm's: daemons of steps, and srun.

        srun must get no signal, because it answers TERM by killing all tasks unless slurmctld has announced the end to
        srun. A signal from slurmctld always comes after this announcement.
        """
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                wanted = [f"SLURM_JOB_ID={self.number}", *([] if rank is None else [f"RANK={rank}"])]
                mine = {name.encode() for name in wanted} <= set((entry / "environ").read_bytes().split(b"\0"))
                conf = f"SLURM_CONF={self.cluster.folder}".encode() in (entry / "environ").read_bytes()
                if mine and conf and (entry / "comm").read_text().strip() not in ("srun", "slurmstepd"):
                    found.append(int(entry.name))
        return found

    def burst(self) -> int:
        """Sends USR2, TERM and TERM to every process of the job within 10 ms. Returns the number of processes."""
        pids = self.processes()
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGTERM):
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            time.sleep(0.003)
        return len(pids)


def hosts(run: RunFolder, *, attempt: int = 0) -> list[str]:
    """Returns the nodes of four ranks, from the logs of the ranks."""
    logs = [run.log_of(rank).read_text().splitlines() for rank in range(4)]
    return [
        [line for line in log if line.startswith("--- attempt")][attempt].rpartition(", ")[2].partition(".")[0]
        for log in logs
    ]


def overrides(values: Mapping[str, Any]) -> Sequence[str]:
    """Returns overrides as words of a command line."""
    return [f"{key}={value}" for key, value in values.items()]
