"""Numbers of rank 0 as metrics of Ray: it sends them to a socket of its node, where its actor hands them to Ray.

A rank is no worker of Ray and cannot report there itself. A datagram holds the samples of a step
(`moe_dist.monitor.sinks.ray`); they show as `ray_moe_dist_...` at the metrics port of rank 0's node.
"""

import json
import socket
import threading
from pathlib import Path

from ray.util.metrics import Gauge

LARGEST = 1 << 18  # bytes of a datagram; 40 scalars take 10 KB


def serve_metrics(path: Path) -> None:
    """Listens at a new Unix socket from now on, from a thread that ends with the process.

    Args:
        path: At most 107 characters, as for all Unix sockets.
    """
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(path))
    threading.Thread(target=_serve, args=(receiver,), name="metrics", daemon=True).start()


def _serve(receiver: socket.socket) -> None:
    gauges: dict[str, Gauge] = {}
    while True:
        for name, meaning, labels, value in json.loads(receiver.recv(LARGEST)):
            if name not in gauges:
                gauges[name] = Gauge(name, description=meaning, tag_keys=tuple(labels))
            gauges[name].set(value, tags=labels)
