"""Starts a real Ray on this machine: a head and labelled nodes with loopback addresses, and drivers that run on them.

Ray keeps all its files below RAY_TMPDIR, whose path must be short because Unix sockets are in it.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.signals import child_of
from tests.support.shape import drawn

ROOT = Path(__file__).parents[2]
CONFIG = "configs/adamoe_moma_tiny_cpu.yaml"  # the default model
DATA = ROOT / ".cache" / "data" / "openmoji"
MODALITIES = ("text", "text", "image", "image")  # labels of nodes 0 to 3
STORE_BYTES = 80_000_000
MARK = "MOE_DIST_TEST_MARK"  # variable that marks all processes which a run starts
# Ranks 0 and 2 have image experts; ranks 1 and 3 have text experts. The label of a rank's node names this modality.
INTERLEAVED = (
    "placement.groups={text: {ranks: [1, 3], node: {labels: {modality: text}}}, "
    "image: {ranks: [0, 2], node: {labels: {modality: image}}}}"
)
QUICK = (
    "evaluation.every=1000",
    "evaluation.final_sequences=8",
    "evaluation.balance_efficiency=false",
    "evaluation.ablate_experts=false",
)


@contextlib.contextmanager
def environment(**more: str) -> Iterator[Path]:
    """Sets the environment of all processes of a test cluster. Yields its RAY_TMPDIR, and removes it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
    site = folder / "cluster.yaml"
    keys = "cpus_per_rank: 1\n" if drawn().threads == "key" else ""
    site.write_text(f"gpus: {{syntax: none}}\nranks_per_node: 1\n{keys}")
    changes: dict[str, str | None] = {
        "RAY_TMPDIR": str(folder),
        "TMPDIR": str(folder),  # for the actors
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_raylet_start_wait_time_s": "180",  # on a busy machine a node may take minutes to start
        "RAY_worker_niceness": "0",  # Ray's default, 15, would starve workers on a busy machine
        "RAY_COLOR_PREFIX": "0",
        "GLOO_SOCKET_IFNAME": "lo",  # the machine's host name may not resolve
        "OMP_NUM_THREADS": "1" if drawn().threads == "user" else None,
        "MOE_DIST_CLUSTER": str(site),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # like an activated environment
        **more,
    }
    before = {name: os.environ.get(name) for name in changes}
    set_variables(changes)
    try:
        yield folder
    finally:
        set_variables(before)
        shutil.rmtree(folder, ignore_errors=True)


def set_variables(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)


def address(slot: int) -> str:
    """Returns the address of a node."""
    return f"{drawn().network}.{slot + 2}"


class RayCluster:
    """A head without CPUs and four nodes with one CPU each, all in this process.

    Args:
        folder: RAY_TMPDIR. Each node has its own folder in it, because nodes that share a folder would unpack the job's
            code there at the same time.
    """

    def __init__(self, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self._folder = folder

        head = {"num_cpus": 0, "include_dashboard": False, "node_ip_address": "127.0.0.100"}
        head["dashboard_agent_listen_port"] = free_port()  # another Ray on this machine may use the default port
        self._cluster = Cluster(initialize_head=True, head_node_args={**head, "object_store_memory": STORE_BYTES})
        self.address: str = self._cluster.address  # pyright: ignore
        self._nodes: list[Any] = [self._add(slot) for slot in range(len(MODALITIES))]
        self._cluster.wait_for_nodes(timeout=600.0)

    def _add(self, slot: int, **variables: str) -> Any:
        return self._cluster.add_node(
            wait=False,
            num_cpus=1,
            labels={"modality": MODALITIES[slot], "slot": str(slot)},
            node_ip_address=address(slot),
            object_store_memory=STORE_BYTES,
            temp_dir=f"{self._folder}/n{slot}",
            include_log_monitor=True,  # sends rank 0's output to the driver
            env_vars=variables,
        )

    def kill(self, slot: int) -> None:
        """Kills all Ray processes of a node."""
        self._cluster.remove_node(self._nodes[slot], allow_graceful=False)

    def replace(self, slot: int, **variables: str) -> None:
        """Starts a node with the labels of a killed node; its workers have `variables` in their environment."""
        self._nodes[slot] = self._add(slot, **variables)

    def slot_of(self, pid: int) -> int:
        """Returns the node that started a process, found among the process's ancestors."""
        raylets = {node.all_processes["raylet"][0].process.pid: slot for slot, node in enumerate(self._nodes)}
        while pid not in raylets:
            pid = parent(pid)
            assert pid > 1, "it descends from no node"
        return raylets[pid]

    def metrics_address(self, slot: int) -> str:
        """Returns the address of a node's metrics."""
        node = self._nodes[slot]
        return f"{node.node_ip_address}:{node.metrics_export_port}"

    def close(self) -> None:
        self._cluster.shutdown()


class Driver:
    """A driver in another process, and its run.

    Args:
        module: The module to run.
        address: The cluster's address.
        run: The run's folder.
        arguments: Overrides, and options of the module.
        log: File to which the driver's output is appended.
        config: The configuration to train.
    """

    def __init__(
        self,
        module: str,
        address: str,
        run: RunFolder,
        *arguments: str,
        log: Path,
        config: str = CONFIG,
        **variables: str,
    ) -> None:
        self.run, self.mark, self._log, self._config = run, f"{run.path.name}-{time.time()}", log, config
        variables = {**variables, MARK: self.mark, "RAY_ADDRESS": address}
        with log.open("ab") as stream:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, config, *arguments],
                cwd=ROOT,
                env={**os.environ, **variables},
                stdout=stream,
                stderr=stream,
                preexec_fn=child_of(os.getpid(), ignore_stop=False),
            )

    @property
    def printed(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> int:
        """Returns the driver's exit code. Requires that no process of the run remains."""
        code = self.process.wait()
        self.wait_until(lambda: not marked(self.mark), "processes of the run are left", alive=False)
        return code

    def wait_until(self, condition: Callable[[], bool], what: str, *, alive: bool = True) -> None:
        while not condition():
            assert not alive or self.process.poll() is None, f"{what}: the driver ended\n{self.printed}"
            time.sleep(0.05)

    def wait_for_step(self, step: int) -> None:
        self.wait_until(lambda: any(line["step"] >= step for line in steps(self.run)), f"step {step}")

    def ranks(self) -> dict[int, int]:
        """Returns the process id of each rank."""
        found = {}
        for pid in marked(self.mark):
            with contextlib.suppress(OSError, KeyError):
                command = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
                if self._config in command and "launchers.ray.rank_supervisor" not in command and pid != self.process.pid:
                    found[int(variables_of(pid)["RANK"])] = pid
        return found


def overrides(root: Path, name: str, steps: int, *more: str) -> list[str]:
    """Returns overrides for a short run of the default model."""
    return [f"run.root={root}", f"run.name={name}", f"data.path={DATA}", f"train.steps={steps}", *QUICK, *more]


def steps(run: RunFolder) -> list[dict[str, Any]]:
    """Returns the complete step records."""
    if not run.metrics_jsonl.exists():
        return []
    lines = run.metrics_jsonl.read_text().rpartition("\n")[0].splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def marked(mark: str) -> list[int]:
    """Returns the processes with a mark in their environment, in any session and with any parent, except zombies."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if f"{MARK}={mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def variables_of(pid: int) -> Mapping[str, str]:
    """Returns the environment with which a process started."""
    words = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return dict(word.split("=", 1) for word in words if "=" in word)


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def actor_of(rank_pid: int) -> int:
    """Returns the Ray worker among the ancestors of a rank's process."""
    pid = parent(rank_pid)
    while "launchers.ray.rank_supervisor" in Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0"):
        pid = parent(pid)
    return pid


def end_all(folder: Path) -> None:
    """Kills all processes with this RAY_TMPDIR. `ray stop` would also end every other Ray on the machine."""
    ours = f"RAY_TMPDIR={folder}".encode()
    for _ in range(20):
        left = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdecimal() and int(entry.name) != os.getpid():
                    words = (entry / "environ").read_bytes().split(b"\0")
                    if ours in words and b"ray" in (entry / "cmdline").read_bytes():
                        left.append(int(entry.name))
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


class StartedRay:
    """A Ray that `ray start` started: a head with the job API, and four nodes with one CPU each.

    Args:
        folder: RAY_TMPDIR.
    """

    def __init__(self, folder: Path) -> None:
        gcs, dashboard = free_port(), free_port()
        self.address = f"127.0.0.100:{gcs}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        # Ray replaces 127.0.0.1 by the machine's outward address, but keeps other addresses of 127/8.
        head = ["--head", "--node-ip-address=127.0.0.100", f"--port={gcs}", "--num-cpus=1", "--labels=role=head"]
        self._start(*head, "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}").communicate()
        # Each node has its own folder, because nodes that start together in one folder would take each other's sockets.
        joining = [
            self._start(
                f"--address={self.address}",
                f"--node-ip-address={address(slot)}",
                "--num-cpus=1",
                f"--labels=modality={modality},slot={slot}",
                "--min-worker-port=0",
                "--max-worker-port=0",
                f"--temp-dir={folder}/n{slot}",
            )
            for slot, modality in enumerate(MODALITIES)
        ]
        for each in joining:
            printed, _ = each.communicate()
            assert each.returncode == 0, printed.decode()

    @staticmethod
    def _start(*options: str) -> subprocess.Popen[bytes]:
        own_port = f"--dashboard-agent-listen-port={free_port()}"  # by default all nodes of this machine use one port
        command = ["ray", "start", *options, own_port, f"--object-store-memory={STORE_BYTES}", "--disable-usage-stats"]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=ROOT)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
