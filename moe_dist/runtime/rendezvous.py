"""Where the ranks of an attempt find rank 0: an address that it publishes in the run folder. No torch here.

    rendezvous.json (0600, of the ranks' own user)     attempt_id, attempt, host, port, secret

Rank 0 lets the kernel choose a free port and keeps the listening socket, so that nobody can take the port in between. The
others wait for a file of their own attempt; what an earlier one left is never taken. The secret goes before every key
in the store: it keeps a stray job out, not an attacker, since the store authenticates nobody (docs/security.md).
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

from moe_dist.errors import ConfigError, PlacementError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.ownership import RunFolderError, user_name

HOST_VARIABLE = "MOE_DIST_RENDEZVOUS_HOST"
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """Where rank 0 listens, and for whom.

    Attributes:
        attempt_id, attempt: Of the ranks that may come.
        host, port: An IPv4 address of rank 0's node.
        secret: Prefix of all keys.
    """

    attempt_id: str
    attempt: int
    host: str
    port: int
    secret: str


def address_file(run_folder: Path) -> Path:
    """Where an attempt publishes its address."""
    return run_folder / "rendezvous.json"


def listening_host(env: RankEnv, variables: Mapping[str, str]) -> str:
    """The address of this node that its peers reach, and the only one that rank 0 listens at: the loopback where all ranks
    are on this node and MOE_DIST_RENDEZVOUS_HOST says nothing else, or `node_address`.

    Raises:
        ConfigError: as `node_address`.
    """
    if env.local_world_size == env.world_size and not variables.get(HOST_VARIABLE):
        return "127.0.0.1"
    return node_address(variables)


def node_address(variables: Mapping[str, str]) -> str:
    """The address of this node that other nodes reach.

    In this order: MOE_DIST_RENDEZVOUS_HOST (a name or address of this node); the interface that GLOO_SOCKET_IFNAME names;
    what the host's own name stands for.

    Raises:
        ConfigError: none of them is an address that other nodes could reach.
    """
    if given := variables.get(HOST_VARIABLE):
        return _resolve(given, f"environment variable {HOST_VARIABLE}={given!r}")
    interface = variables.get("GLOO_SOCKET_IFNAME", "")
    for found in psutil.net_if_addrs().get(interface, []):
        if found.family == socket.AF_INET:
            return found.address
    name = socket.gethostname()
    host = _resolve(name, f"this node's own name {name!r}")
    if host.startswith("127."):
        raise ConfigError(
            f"rank 0 cannot tell which of its addresses the other nodes reach: {name!r} stands for {host}; set "
            f"{HOST_VARIABLE} to a name or address of the node, or GLOO_SOCKET_IFNAME to the network's interface"
        )
    return host


def publish(path: Path, env: RankEnv, host: str) -> tuple[Address, socket.socket]:
    """On rank 0: listens at a free port of `host`, and says so in `path`, which only this user may read.

    Returns:
        The address, and its listening socket.

    Raises:
        PlacementError: the address is none of this node.
        OSError: the file cannot be written.
    """
    try:
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise PlacementError(
            f"rank 0 cannot listen at {host}: {error.strerror}; set {HOST_VARIABLE} to an address of its node"
        ) from error
    address = Address(env.attempt_id, env.attempt, host, listener.getsockname()[1], secrets.token_hex(16))
    new = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as stream:
            json.dump(asdict(address), stream)
        os.replace(new, path)
    except BaseException:
        listener.close()
        new.unlink(missing_ok=True)
        raise
    return address, listener


def find(path: Path, env: RankEnv, *, wait_seconds: float) -> Address:
    """On the other ranks: waits for the address of this attempt.

    Raises:
        RunFolderError: it did not come in time.
        ConfigError: the file is not this user's alone.
    """
    deadline = time.monotonic() + wait_seconds
    while True:
        address = _read(path)
        if address is not None and (address.attempt_id, address.attempt) == (env.attempt_id, env.attempt):
            return address
        if time.monotonic() >= deadline:
            there = f"; what lies there is of attempt {address.attempt_id}" if address is not None else ""
            raise RunFolderError(
                f"rank {env.rank} waited {wait_seconds:g} s for rank 0 to say in {path} where it listens (attempt "
                f"{env.attempt_id}){there}; the log of rank 0 says why it did not, or this node does not see that folder"
            )
        time.sleep(POLL_SECONDS)


def withdraw(path: Path, address: Address) -> None:
    """On rank 0, once all ranks have come: nobody needs the file any more."""
    if _read(path) == address:
        path.unlink(missing_ok=True)


def _read(path: Path) -> Address | None:
    """What was published; None where nothing is, or nothing of that form."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it must be a plain file of this user; remove it") from error
    with open(descriptor, "rb") as stream:
        found = os.fstat(stream.fileno())
        ours = found.st_uid in (os.geteuid(), path.parent.stat().st_uid)  # that the folder is ours was found before
        if not ours or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path}: belongs to {user_name(found.st_uid)} with mode {stat.S_IMODE(found.st_mode):04o}; ranks go only "
                "where a file of their own user, closed to all others, sends them; remove it"
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
