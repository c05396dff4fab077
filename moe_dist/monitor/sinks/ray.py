"""Sends the latest scalars to `ray.util.metrics`, through the actor of rank 0 (`launchers/ray/metrics.py`). Does not import
Ray.

The Ray launcher enables it by an environment variable, so that the configuration stays the same on every cluster.
"""

import contextlib
import json
import socket
from collections.abc import Mapping

from moe_dist.monitor.metrics import Record
from moe_dist.monitor.sinks.prometheus import samples
from moe_dist.monitor.sinks.sink import Sink
from moe_dist.monitor.statistics import EvaluationResult


class RaySink(Sink):
    """Sends the scalars of each step in one datagram to a Unix socket. A datagram without reader or buffer space is lost:
    training does not wait, and metrics.jsonl has the records.

    Args:
        socket_path: The socket on which the actor listens.
        run_name: Value of the label `run` on every sample.
        resume_step: Last step of the earlier attempt; unused, since gauges keep no history.
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

    def close(self) -> None:
        self._socket.close()

    def _send(self, scalars: Mapping[str, float | None]) -> None:
        content = json.dumps(list(samples(scalars, step=self._step, run_name=self._run_name)))
        with contextlib.suppress(OSError):
            self._socket.sendto(content.encode(), self._path)
