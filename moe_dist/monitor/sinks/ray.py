"""The latest scalars for `ray.util.metrics`, by way of the actor of rank 0 (`launchers/ray/metrics.py`). No import of Ray.

The launcher for Ray asks for it by an environment variable, since no configuration has to change for another cluster.
"""

import contextlib
import json
import socket
from collections.abc import Mapping

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.prometheus import samples
from moe_dist.monitor.statistics import EvaluationResult


class RaySink:
    """Sends the scalars of each step in one datagram to a Unix socket. One that finds no reader, or no room, is lost: the
    training does not wait, and the records are elsewhere.

    Args:
        socket_path: Where the actor listens.
        run_name: Value of the label `run` on every sample.
        resume_step: Last step of the earlier attempt; gauges need nothing of it.
    """

    def __init__(self, *, socket_path: str, run_name: str, resume_step: int = 0) -> None:
        self._path, self._run_name, self._step = socket_path, run_name, resume_step
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def step(self, record: Record) -> None:
        self._step = record.step
        self._send(record.scalars)

    def evaluation(self, result: EvaluationResult, scalars: Mapping[str, float | None]) -> None:
        self._send(scalars)

    def text(self, tag: str, markdown: str) -> None:
        """Nothing: metrics are numbers."""

    def flush(self) -> None:
        """Nothing: what was sent is gone."""

    def close(self) -> None:
        self._socket.close()

    def _send(self, scalars: Mapping[str, float | None]) -> None:
        content = json.dumps(list(samples(scalars, step=self._step, run_name=self._run_name)))
        with contextlib.suppress(OSError):
            self._socket.sendto(content.encode(), self._path)
