"""The doctor's task on each node: `python -m launchers.doctor.on_node QUESTIONS` prints the node's facts as one line.

The task also tests whether each node can connect to a free port of rank 0's node, at the address that a run's rendezvous
would use (moe_dist/runtime/rendezvous.py). Does not import torch.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from moe_dist.errors import ConfigError
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.node.facts import NodeFacts, Questions, look, node_name, to_line, unreachable, unresolved
from moe_dist.runtime.rendezvous import HOST_VARIABLE, node_address

WAIT_SECONDS = 45.0  # timeout of the connection test; the scheduler may start the nodes one after the other
POLL_SECONDS = 0.1


def visit(questions: Questions, *, first: bool, env: Mapping[str, str] = os.environ) -> NodeFacts:
    """Collects the facts about this node, and tests the connection. `first` is True on rank 0's node."""
    facts = look(questions, env=env)
    if questions.meeting is not None and questions.num_nodes > 1:
        path = Path(questions.meeting)
        unknown, error = (listen(path, questions.num_nodes, env), "") if first else connect(path)
        facts = replace(facts, unresolved={**facts.unresolved, **unknown}, unreachable=error)
    # `os.cpu_count` counts all cores of the node, even if the scheduler has bound this task to some of them. The clock is
    # read last, because the receiver compares its time with the arrival time of the line.
    return replace(facts, cores=os.cpu_count(), clock=time.time())


def listen(path: Path, num_nodes: int, variables: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Writes the address of rank 0's node to `path`, and waits until the other nodes have connected. Returns the name of
    this node with the resolver's error if the name does not resolve, otherwise {}."""
    name = variables.get(HOST_VARIABLE) or node_name(variables)
    try:
        address = node_address(variables)
        listener = socket.create_server((address, 0), backlog=num_nodes)  # with port 0 the kernel chooses a free port
    except (ConfigError, OSError) as error:
        _publish(path, name, "", 0)  # port 0 tells the other nodes to resolve the name and not to connect
        return {name: str(error)}
    with listener:
        _publish(path, name, address, listener.getsockname()[1])
        deadline, missing = time.monotonic() + WAIT_SECONDS, num_nodes - 1
        while missing and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                listener.accept()[0].close()  # the open connection is the test; nothing is sent
                missing -= 1
    return {}


def connect(path: Path) -> tuple[dict[str, str], str]:
    """Runs on all nodes except rank 0's: resolves the name of rank 0's node and connects to that node. Returns a mapping
    from the name to the resolver's error, and the connection's error. Both are empty without an error. If `path` never
    appears, the folder is not shared; another check reports this."""
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError):  # the file does not exist yet or is not readable
            host, address, port = json.loads(path.read_text())
            return unresolved([host]), unreachable(address, port) if address else ""
        time.sleep(POLL_SECONDS)
    return {}, ""


def _publish(path: Path, host: str, address: str, port: int) -> None:
    with contextlib.suppress(OSError):  # another check reports a folder that is not writable
        write_atomically(path, json.dumps([host, address, port]))


if __name__ == "__main__":
    questions = Questions(**json.loads(sys.argv[1]))
    print(to_line(visit(questions, first=os.environ.get("RANK", "0") == "0")), flush=True)
