"""The actor of one rank: says where it is, starts the rank through a keeper, and tells how it ended. Runs on Ray's nodes.

The rank is a process of its own and not this one: signals reach its main thread, its output goes into its log, it may end
itself at any moment (a failed rank does), and it never shares an interpreter with Ray's threads.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from launchers.ray.metrics import serve_metrics
from launchers.ray.rank_supervisor import Order
from launchers.supervise import is_stopped
from moe_dist.runtime.environment import RAY_METRICS

SEEN_SECONDS = 30.0
POLL_SECONDS = 0.2


@dataclass(frozen=True)
class WorkerInfo:
    """Where an actor is.

    Attributes:
        node_id: Ray's name of the node.
        host: Address of the node, as its peers reach it.
        labels: Of the node.
        gpus: Ids of the GPUs that Ray has given this actor.
        missing: Paths that were asked for and are not there.
    """

    node_id: str
    host: str
    labels: Mapping[str, str]
    gpus: tuple[str, ...]
    missing: tuple[str, ...] = ()


class RankActor:
    """Methods but `wait` answer at any time; they run in threads, since `wait` lasts as long as the rank."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._keeper: subprocess.Popen[bytes] | None = None
        self._pid: int | None = None
        self._socket_folder: tempfile.TemporaryDirectory[str] | None = None

    def __repr__(self) -> str:  # what Ray puts before the lines that it brings to the driver
        return f"rank {self._rank}"

    def worker(self, paths: Sequence[str]) -> WorkerInfo:
        """Where this is. An actor that has answered is really there.

        Args:
            paths: Files or folders that must be seen from here; waited for, since the clients of a file server may remember
                for a while that something was not there.
        """
        deadline = time.monotonic() + SEEN_SECONDS
        while (missing := [path for path in paths if not Path(path).exists()]) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        context = ray.get_runtime_context()
        return WorkerInfo(
            node_id=context.get_node_id(),
            host=ray.util.get_node_ip_address(),
            labels={key: str(value) for key, value in context.get_node_labels().items()},
            gpus=tuple(map(str, context.get_accelerator_ids().get("GPU", ()))),
            missing=tuple(missing),
        )

    def start(self, argv: Sequence[str], env: Mapping[str, str], log: str, shown: bool) -> None:
        """Starts the rank.

        Args:
            argv: An empty first word is this interpreter.
            env: Variables on top of this node's.
            log: File for its output.
            shown: Whether it is rank 0, whose output is shown and whose numbers become Ray's metrics.

        Raises:
            RuntimeError: it could not be started; its words are in the worker's log.
        """
        variables = {**os.environ, **env}
        if shown:
            self._socket_folder = tempfile.TemporaryDirectory(prefix="moe_dist_")
            path = Path(self._socket_folder.name) / "metrics"
            serve_metrics(path)
            variables[RAY_METRICS] = str(path)
        self._keeper = subprocess.Popen(
            [sys.executable, "-m", "launchers.ray.rank_supervisor"],
            env=variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ray kills the process group of a worker that ends
        )
        self._tell(Order([argv[0] or sys.executable, *argv[1:]], variables, log, shown).line())
        self._pid = self._hear().get("pid")
        if self._pid is None:
            raise RuntimeError(f"{socket.gethostname()}: {argv[0]} could not be started")

    def wait(self) -> int:
        """The rank's exit code, once it has ended; negative is the signal that killed it."""
        code = self._hear().get("code", -signal.SIGKILL)  # no word: the keeper itself was killed, and the rank with it
        self._pid = None
        assert self._keeper is not None
        self._keeper.wait()  # until nothing that the rank has started is left
        return code

    def send(self, number: signal.Signals) -> None:
        """Passes a signal on to the rank."""
        self._tell(f"{number.name}\n".encode())

    def frozen(self) -> bool:
        """Whether the rank stands still after SIGSTOP."""
        return self._pid is not None and is_stopped(self._pid)

    def _tell(self, line: bytes) -> None:
        assert self._keeper is not None
        assert self._keeper.stdin is not None
        with contextlib.suppress(OSError):  # it has ended
            self._keeper.stdin.write(line)
            self._keeper.stdin.flush()

    def _hear(self) -> dict[str, Any]:
        assert self._keeper is not None
        assert self._keeper.stdout is not None
        line = self._keeper.stdout.readline()
        return json.loads(line) if line else {}
