"""Files in the run folder by which the ranks find rank 0, before there is a process group. Does not import torch.

    rendezvous.json (mode 0600, owned by the ranks' user)     attempt_id, attempt, host, port, secret
    .shared_<attempt_id>_<attempt>                            shows that a rank sees the same folder as rank 0

Rank 0 publishes its address, and the other ranks accept only an address of their own attempt. The secret is a prefix of
every key in torch's store: it separates jobs, but does not stop an attacker, because the store has no authentication
(docs/security.md).
"""

import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from moe_dist.errors import ConfigError, ResourceError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.ownership import RunFolderError, user_name

HOST_VARIABLE = "MOE_DIST_RENDEZVOUS_HOST"
SHARED_SECONDS = 60.0  # seconds; an NFS client may not see a new file at once
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Address:
    """The published address of rank 0.

    Attributes:
        attempt_id, attempt: The attempt whose ranks use this address.
        host, port: An IPv4 address of rank 0's node, and the port.
        secret: Prefix of all keys in torch's store.
    """

    attempt_id: str
    attempt: int
    host: str
    port: int
    secret: str


@contextmanager
def shared_with_rank_0(run_folder: Path, env: RankEnv, *, wait_seconds: float = SHARED_SECONDS) -> Iterator[None]:
    """Checks that every rank sees rank 0's run folder: with a separate local folder on each node, a checkpoint would be
    scattered over the nodes and could not be loaded. Rank 0 writes a file, and the other ranks wait for it.

    Enter it after rank 0 has opened the run folder, and create the process group inside the block: rank 0 deletes the file
    at the end of the block, so all ranks must have entered by then. Ranks of a single node skip the check.

    Raises:
        ConfigError: the file did not appear, because run.root is a different folder on this node, or missing.
    """
    probe = run_folder / f".shared_{env.attempt_id}_{env.attempt}"
    if env.local_world_size == env.world_size:
        yield
    elif env.rank == 0:
        probe.write_text(f"{env.attempt_id}\n")  # only the file's existence matters
        try:
            yield
        finally:
            probe.unlink(missing_ok=True)
    else:
        deadline = time.monotonic() + wait_seconds
        while not probe.exists():  # costs one stat on the shared file system
            if time.monotonic() >= deadline:
                what = "is a different folder, or rank 0 has not started" if run_folder.exists() else "does not exist"
                raise ConfigError(
                    f"rank {env.rank} waited {wait_seconds:g} s for {probe.name}, which rank 0 writes into {run_folder}; "
                    f"on this node it {what}; run.root must be a folder that all nodes share"
                )
            time.sleep(POLL_SECONDS)
        yield


def address_file(run_folder: Path) -> Path:
    return run_folder / "rendezvous.json"


def listening_host(env: RankEnv, variables: Mapping[str, str]) -> str:
    """The only address at which rank 0 listens: the loopback if all ranks are on this node and MOE_DIST_RENDEZVOUS_HOST is
    not set, otherwise `node_address`."""
    if env.local_world_size == env.world_size and not variables.get(HOST_VARIABLE):
        return "127.0.0.1"  # no other machine can connect
    return node_address(variables)


def node_address(variables: Mapping[str, str]) -> str:
    """The address at which other nodes can reach this node. Taken from MOE_DIST_RENDEZVOUS_HOST (a name or address of this
    node), else the interface GLOO_SOCKET_IFNAME, else the host name. Raises ConfigError if none of them
    gives a reachable address."""
    if given := variables.get(HOST_VARIABLE):
        return _resolve(given, f"environment variable {HOST_VARIABLE}={given!r}")
    interface = variables.get("GLOO_SOCKET_IFNAME", "")
    for found in psutil.net_if_addrs().get(interface, []):
        if found.family == socket.AF_INET:
            return found.address
    name = socket.gethostname()
    host = _resolve(name, f"this node's own name {name!r}")
    if host.startswith("127."):  # Debian's default /etc/hosts maps the host name to the loopback
        raise ConfigError(
            f"rank 0 has no address that other nodes can reach: its host name {name!r} resolves to {host}; set "
            f"{HOST_VARIABLE} to a name or address of the node, or GLOO_SOCKET_IFNAME to the network's interface"
        )
    return host


def publish(path: Path, env: RankEnv, host: str) -> tuple[Address, socket.socket]:
    """On rank 0: listens at a free port of `host`, writes the address to `path`, and returns both. Only this user can read
    the file.

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
    port, secret = listener.getsockname()[1], secrets.token_hex(16)  # a new secret for each attempt
    address = Address(env.attempt_id, env.attempt, host, port, secret)
    try:
        write_atomically(path, json.dumps(asdict(address)), mode=0o600)
    except BaseException:
        listener.close()
        raise
    return address, listener


def find(path: Path, env: RankEnv, *, wait_seconds: float) -> Address:
    """On the other ranks: waits for the address of this attempt. Raises RunFolderError if rank 0 did not publish it in
    time, and ConfigError if the file belongs to another user or others can access it."""
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
        time.sleep(POLL_SECONDS)  # each poll reads a small file on the shared file system


def withdraw(path: Path, address: Address) -> None:
    """On rank 0, after all ranks have connected: deletes the file."""
    if _read(path) == address:  # a later attempt may have replaced it
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
        except (ValueError, TypeError):  # no JSON, or other fields: a file of another version
            return None


def _resolve(name: str, what: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"{what}: {error}; set {HOST_VARIABLE} to an address of rank 0's node") from error
