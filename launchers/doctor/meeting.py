"""Whether the nodes of a job can reach the node of rank 0: it listens at a free port, the others connect. No torch.

As at the start of a run (runtime/rendezvous.py), and with its rules for the address; but here each node tells what it saw.
"""

import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.doctor.node_facts import node_name, unreachable, unresolved
from moe_dist.errors import ConfigError
from moe_dist.runtime.rendezvous import HOST_VARIABLE, node_address

WAIT_SECONDS = 45.0  # nodes may be slow to start one after the other
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Seen:
    """What one node saw: names that do not resolve there, with the resolver's words; and why it reached nobody, or ''."""

    unresolved: Mapping[str, str]
    unreachable: str = ""


@dataclass(frozen=True)
class Where:
    """Where the first node listens.

    Attributes:
        host: Its name, which the others must be able to resolve.
        address, port: Empty and 0 where it has no address that others could reach.
    """

    host: str
    address: str
    port: int


def listen(path: Path, num_nodes: int, variables: Mapping[str, str] = os.environ) -> Seen:
    """On the first node: says in `path` where it listens, and waits for the others to have come."""
    name = variables.get(HOST_VARIABLE) or node_name(variables)
    try:
        address = node_address(variables)
        listener = socket.create_server((address, 0), backlog=num_nodes)
    except (ConfigError, OSError) as error:
        _publish(path, Where(name, "", 0))
        return Seen({name: str(error)})
    with listener:
        _publish(path, Where(name, address, listener.getsockname()[1]))
        deadline, missing = time.monotonic() + WAIT_SECONDS, num_nodes - 1
        while missing and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()
                missing -= 1
    return Seen({})


def come(path: Path) -> Seen:
    """On the others: looks up the first node's name and connects to it. A file that never comes leaves both open: then
    the folder is not shared, which is another check's line."""
    deadline = time.monotonic() + WAIT_SECONDS
    while (where := _read(path)) is None:
        if time.monotonic() >= deadline:
            return Seen({})
        time.sleep(POLL_SECONDS)
    return Seen(unresolved([where.host]), unreachable(where.address, where.port) if where.address else "")


def _publish(path: Path, where: Where) -> None:
    new = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):  # that nobody can write here is another check's line
        new.write_text(json.dumps(asdict(where)))
        os.replace(new, path)


def _read(path: Path) -> Where | None:
    try:
        return Where(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return None
