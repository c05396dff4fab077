"""The actor of one rank, on a node of Ray: starts the rank through `rank_supervisor`, and returns the rank's exit code.

The rank and the actor run in different processes. The rank therefore gets signals in its main thread, can exit at any
time, and shares no interpreter with Ray's threads.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.metrics import Gauge

from launchers.memory_limit import MemoryLimit
from launchers.supervise import is_stopped
from moe_dist.runtime.environment import RAY_METRICS

SEEN_SECONDS = 30.0  # an NFS client may take this many seconds to see a new file; the data are not new
POLL_SECONDS = 0.2
LARGEST = 1 << 18  # bytes of the largest datagram; 40 scalars take 10 KB


@dataclass(frozen=True)
class WorkerInfo:
    """The node and GPUs of an actor. Other nodes reach the actor's node at the address `host`."""

    node_id: str
    host: str
    labels: Mapping[str, str]
    gpus: tuple[str, ...]
    missing: tuple[str, ...] = ()


class RankActor:
    """Controls one rank. Methods run in threads, because `wait` blocks until the rank has ended."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._supervisor: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._memory = MemoryLimit()

    def __repr__(self) -> str:  # Ray prefixes forwarded output lines with this text
        return f"rank {self._rank}"

    def worker(self, paths: Sequence[str], data: str) -> WorkerInfo:
        """Returns the node and GPUs of this actor; a result proves that the actor runs. Waits up to SEEN_SECONDS for
        `paths`, the new files and folders that must exist on the node, but not for the data."""
        deadline, missing = time.monotonic() + SEEN_SECONDS, [] if Path(data).exists() else [data]
        while not missing and (unseen := [path for path in paths if not Path(path).exists()]):
            missing = unseen if time.monotonic() >= deadline else []
            time.sleep(POLL_SECONDS)  # an NFS client refreshes its cache only after some time
        context = ray.get_runtime_context()
        return WorkerInfo(
            node_id=context.get_node_id(),
            host=ray.util.get_node_ip_address(),
            labels={key: str(value) for key, value in context.get_node_labels().items()},
            gpus=tuple(map(str, context.get_accelerator_ids().get("GPU", ()))),
            missing=tuple(missing),
        )

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: str, shown: bool) -> None:
        """Starts the rank. Raises RuntimeError if the rank does not start; the error is in the Ray worker's log.

        Args:
            argv: Program and arguments; an empty program means this interpreter.
            shown: True for rank 0. Its output goes to the driver, and its metrics go to Ray.
        """
        variables = {**os.environ, **env}
        scratch = tempfile.mkdtemp(prefix="moe_dist_") if shown else ""  # the supervisor outlives the actor and deletes it
        if shown:
            variables[RAY_METRICS] = str(Path(scratch) / "metrics")
            serve_metrics(Path(variables[RAY_METRICS]))  # runs in the actor, because only the actor can use Ray's API
        self._supervisor = subprocess.Popen(
            [sys.executable, "-m", "launchers.ray.rank_supervisor"],
            env=variables,
            stdin=subprocess.PIPE,  # the pipe closes when this actor ends for any reason; the supervisor then ends, too
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ray kills an ended worker's process group; the supervisor must outlive the worker
        )
        command = [argv[0] or sys.executable, *argv[1:]]
        self._tell(json.dumps({"argv": command, "env": variables, "log": log, "shown": shown, "scratch": scratch}))
        self._pid = self._hear().get("pid")  # returns when the rank runs
        if self._pid is None:
            raise RuntimeError(f"{socket.gethostname()}: {argv[0]} could not be started")

    def wait(self) -> tuple[int, str]:
        """Waits for the end of the rank. Returns its exit code and, if a memory limit of the node killed the rank, a
        message about this limit. A negative code is the signal that killed the rank."""
        code = self._hear().get("code", -signal.SIGKILL)  # no message comes if supervisor and rank were killed
        words = self._memory.words() if code == -signal.SIGKILL else ""
        self._pid = None
        assert self._supervisor is not None
        self._supervisor.wait()  # the supervisor exits after the last process that the rank has started
        return code, words

    def send(self, number: signal.Signals) -> None:
        """Forwards a signal to the rank."""
        self._tell(number.name)

    def frozen(self) -> bool:
        """Returns whether SIGSTOP has suspended the rank."""
        return self._pid is not None and is_stopped(self._pid)

    def _tell(self, line: str) -> None:
        assert self._supervisor is not None
        assert self._supervisor.stdin is not None
        with contextlib.suppress(OSError):  # the supervisor has ended
            self._supervisor.stdin.write(f"{line}\n".encode())
            self._supervisor.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        """Waits for the supervisor's next message and returns it; returns {} if the supervisor has ended."""
        assert self._supervisor is not None
        assert self._supervisor.stdout is not None
        line = self._supervisor.stdout.readline()
        return json.loads(line) if line else {}


def serve_metrics(path: Path) -> None:
    """Starts a daemon thread that forwards rank 0's metrics to Ray, which exports them as `ray_moe_dist_...` at the metrics
    port of this node. The rank is a plain process and cannot use Ray's API: it sends datagrams
    (`monitor/sinks/prometheus.py`) to the Unix socket `path`, which may have at most 107 characters."""
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))  # the caller starts the rank afterwards, and the rank connects at its first step
    threading.Thread(target=_serve, args=(receiver,), name="metrics", daemon=True).start()


def _serve(receiver: socket.socket) -> None:
    gauges: dict[str, Gauge] = {}
    while True:
        for name, meaning, labels, value in json.loads(receiver.recv(LARGEST)):
            if name not in gauges:  # only one gauge per name, because Ray rejects a second gauge with other labels
                gauges[name] = Gauge(name, description=meaning, tag_keys=tuple(labels))
            gauges[name].set(value, tags=labels)
