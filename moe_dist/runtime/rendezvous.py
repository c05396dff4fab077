"""Rank 0 publishes the rendezvous address in the run folder, and the other ranks read it. Does not import torch.

    rendezvous.json (mode 0600, owned by the ranks' user)     attempt_id, attempt, host, port, secret

The other ranks only accept a file of their own attempt. The secret is a prefix of every key in torch's store: it separates
jobs, but does not stop an attacker, because the store has no authentication (docs/security.md).
"""

import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.ownership import RunFolderError, user_name

HOST_VARIABLE = "MOE_DIST_RENDEZVOUS_HOST"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """The published address of rank 0.

    Attributes:
        attempt_id, attempt: The attempt that this address is for.
        host, port: An IPv4 address of rank 0's node, and the port.
        secret: Prefix of all keys in the store.
    """

    attempt_id: str
    attempt: int
    host: str
    port: int
    secret: str


def address_file(run_folder: Path) -> Path:
    """The file with the address."""
    return run_folder / "rendezvous.json"


def listening_host(env: RankEnv, variables: Mapping[str, str]) -> str:
    """The only address at which rank 0 listens: the loopback if all ranks are on this node and MOE_DIST_RENDEZVOUS_HOST is
    not set, otherwise `node_address`.

    Raises:
        ConfigError: from `node_address`.
    """
    if env.local_world_size == env.world_size and not variables.get(HOST_VARIABLE):
        return "127.0.0.1"
    return node_address(variables)


def node_address(variables: Mapping[str, str]) -> str:
    """The address at which other nodes can reach this node: from MOE_DIST_RENDEZVOUS_HOST (a name or address of this node),
    else of the interface GLOO_SOCKET_IFNAME, else of the host name.

    Raises:
        ConfigError: none of them gives a reachable address.
    """
    if given := variables.get(HOST_VARIABLE):
        return _resolve(given, f"environment variable {HOST_VARIABLE}={given!r}")
    interface = variables.get("GLOO_SOCKET_IFNAME", "")
    for found in psutil.net_if_addrs().get(interface, []):
        if found.family == socket.AF_INET:
            return found.address
    name = socket.gethostname()
    host = _resolve(name, f"this node's own name {name!r}")
    if host.startswith("127."):  # as in Debian's default /etc/hosts
        raise ConfigError(
            f"rank 0 has no address that other nodes can reach: its host name {name!r} resolves to {host}; set "
            f"{HOST_VARIABLE} to a name or address of the node, or GLOO_SOCKET_IFNAME to the network's interface"
        )
    return host


def publish(path: Path, env: RankEnv, host: str) -> tuple[Address, socket.socket]:
    """On rank 0: listens at a free port of `host`, and writes the address to `path`, readable by this user only.

    Returns:
        The address, and the listening socket.

    Raises:
        ResourceError: `host` is not an address of this node.
        OSError: the file cannot be written.
    """
    try:
        # The kernel chooses the port, and the socket stays open: no other process can take the port.
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise ResourceError(
            f"rank 0 cannot listen at {host}: {error.strerror}; set {HOST_VARIABLE} to an address of its node"
        ) from error
    # new for each attempt
    address = Address(env.attempt_id, env.attempt, host, listener.getsockname()[1], secrets.token_hex(16))
    try:
        write_atomically(path, json.dumps(asdict(address)), mode=0o600)
    except BaseException:
        listener.close()
        raise
    return address, listener


def find(path: Path, env: RankEnv, *, wait_seconds: float) -> Address:
    """On the other ranks: waits for the address of this attempt.

    Raises:
        RunFolderError: the address was not published in time.
        ConfigError: the file belongs to another user, or others can access it.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        address = _read(path)
        if address is not None and (address.attempt_id, address.attempt) == (env.attempt_id, env.attempt):
            return address
        if time.monotonic() >= deadline:
            other = f"; the file there is of attempt {address.attempt_id}" if address is not None else ""
            raise RunFolderError(
                f"rank {env.rank} waited {wait_seconds:g} s for rank 0's address in {path} (attempt {env.attempt_id})"
                f"{other}; see the log of rank 0 for the reason, or check that this node sees that folder"
            )
        time.sleep(POLL_SECONDS)


def withdraw(path: Path, address: Address) -> None:
    """On rank 0, after all ranks have connected: deletes the file."""
    if _read(path) == address:
        path.unlink(missing_ok=True)


def _read(path: Path) -> Address | None:
    """The published address; None without a valid file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)  # not through a link of another user
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it must be a regular file of this user; delete it") from error
    with open(descriptor, "rb") as stream:
        found = os.fstat(stream.fileno())  # of the open file, which cannot be exchanged any more
        ours = found.st_uid in (os.geteuid(), path.parent.stat().st_uid)  # the folder's owner was checked at the start
        if not ours or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path}: belongs to {user_name(found.st_uid)} with mode {stat.S_IMODE(found.st_mode):04o}; it must belong "
                "to the user of the ranks with mode 0600; delete it"
            )
        try:
            return Address(**json.load(stream))
        except (ValueError, TypeError):
            return None


def _resolve(name: str, what: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"{what}: {error}; set {HOST_VARIABLE} to an address of rank 0's node") from error
