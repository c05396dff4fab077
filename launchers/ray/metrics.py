"""Forwards rank 0's metrics to Ray, which exports them as `ray_moe_dist_...` at the metrics port of rank 0's node.

A rank is a plain process and cannot use Ray's API. Rank 0 sends datagrams (`monitor/sinks/prometheus.py`) to a Unix
socket that its actor reads.
"""

import json
import socket
import threading
from pathlib import Path

from ray.util.metrics import Gauge

LARGEST = 1 << 18  # bytes of the largest datagram; 40 scalars take 10 KB


def serve_metrics(path: Path) -> None:
    """Starts a daemon thread that reads a new Unix socket. The path of the socket may have at most 107 characters."""
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
