"""Tests whether every node can connect to a free port of rank 0's node. Does not import torch.

It uses the same address as the rendezvous of a run (moe_dist/runtime/rendezvous.py), and every node reports its result.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.doctor.node_facts import node_name, unreachable, unresolved
from moe_dist.errors import ConfigError
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.rendezvous import HOST_VARIABLE, node_address

WAIT_SECONDS = 45.0  # timeout; the scheduler may start the nodes one after the other
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Reachability:
    """Result of one node: names that do not resolve with the resolver's error, and the connection error or ''."""

    unresolved: Mapping[str, str]
    unreachable: str = ""


@dataclass(frozen=True)
class Where:
    """Address of rank 0's node.

    Attributes:
        host: Host name, which the other nodes must be able to resolve.
        address, port: Listening address; empty and 0 if the node has no reachable address.
    """

    host: str
    address: str
    port: int


def listen(path: Path, num_nodes: int, variables: Mapping[str, str] = os.environ) -> Reachability:
    """On rank 0's node: writes its address to `path`, and waits until the others have connected."""
    name = variables.get(HOST_VARIABLE) or node_name(variables)
    try:
        address = node_address(variables)
        listener = socket.create_server((address, 0), backlog=num_nodes)  # port 0: the kernel chooses a free one
    except (ConfigError, OSError) as error:
        _publish(path, Where(name, "", 0))
        return Reachability({name: str(error)})
    with listener:
        _publish(path, Where(name, address, listener.getsockname()[1]))
        deadline, missing = time.monotonic() + WAIT_SECONDS, num_nodes - 1
        while missing and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()  # a connection is enough; nothing is sent
                missing -= 1
    return Reachability({})


def connect(path: Path) -> Reachability:
    """On the other nodes: resolves the name of rank 0's node and connects to it. If `path` never appears, the folder is not
    shared; another check reports that."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (where := _read(path)) is None:
        if time.monotonic() >= deadline:
            return Reachability({})
        time.sleep(POLL_SECONDS)
    return Reachability(unresolved([where.host]), unreachable(where.address, where.port) if where.address else "")


def _publish(path: Path, where: Where) -> None:
    with contextlib.suppress(OSError):  # another check reports a folder that is not writable
        write_atomically(path, json.dumps(asdict(where)))


def _read(path: Path) -> Where | None:
    try:
        return Where(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
