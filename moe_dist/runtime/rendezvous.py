"""Lets ranks find rank 0 and compare settings at a start, before a process group exists. Imports no torch. Its files:

    <run folder>/rendezvous.json    mode 0600, owned by the ranks' user: attempt_id, host, port, secret
    <run folder>/.shared_<key>      shows that a rank sees the same folder as rank 0; each start has a new key

Rank 0 publishes its address. All other ranks accept only an address of their own attempt. The secret is the
prefix of every key in torch's store. It separates jobs, but does not stop an attacker, because the store has no
authentication (docs/security.md).
"""

import json
import logging
import os
import secrets
import socket
import stat
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from moe_dist.config.regular_file import open_regular
from moe_dist.errors import ConfigError, MoeDistError, ResourceError, StoppedError
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.files import write_atomically
from moe_dist.runtime.ownership import user_name
from moe_dist.runtime.signals import DEFAULT_GRACE_SECONDS

logger = logging.getLogger(__name__)

HOST_VARIABLE = "MOE_DIST_RENDEZVOUS_HOST"
SHARED_SECONDS = 60.0  # longest wait of a rank for rank 0's file, which an NFS client may see late
MOST_BYTES = 1 << 12  # largest size of the file that contains the address
POLL_SECONDS = 0.1
SOON_SECONDS = 5.0  # seconds of waiting after which the log first names the reason
SAY_SECONDS = 30.0
TELL_SECONDS = 15.0  # longest time that a rank still tries to meet rank 0 after a stop signal, so that all ranks stop
_SHOWN = 8  # largest number of ranks that a line names


@dataclass(frozen=True)
class Address:
    """The address that rank 0 publishes.

    Attributes:
        attempt_id: Name of the attempt to which the address belongs.
        host, port: An IPv4 address of rank 0's node, and a port on this node.
        secret: Prefix of all keys in torch's store.
    """

    attempt_id: str
    host: str
    port: int
    secret: str


class StartError(MoeDistError):
    """The ranks did not find each other when they started."""

    consequence = True  # because a missing rank or another program is the cause


class StartWait:
    """One rank's wait for other ranks at the start of an attempt.

    Args:
        seconds: The longest wait, counted from the creation of this object.
        stopped: Returns True after a stop signal. The signal ends the wait at once on rank 0. On all other ranks, it ends
            the wait after TELL_SECONDS or half of `grace_seconds`, whichever is shorter.
        grace_seconds: Seconds from a stop signal until the process ends itself.
    """

    def __init__(
        self,
        rank: int,
        seconds: float,
        *,
        stopped: Callable[[], bool] = lambda: False,
        grace_seconds: float = DEFAULT_GRACE_SECONDS,
    ) -> None:
        self.stopped, self._rank, self._seconds = stopped, rank, seconds
        self._tell_seconds = min(TELL_SECONDS, grace_seconds / 2) if rank else 0.0
        self._began = time.monotonic()
        self._say_at = self._began + SOON_SECONDS
        self._stop_at = float("inf")

    def pause(self, whom: str) -> None:
        """Sleeps until the next poll. After 5 s, and then every 30 s, logs that the rank waits for `whom`.

        Raises:
            StartError: the wait has lasted longer than `seconds`.
            StoppedError: a stop signal has ended the wait.
        """
        now = time.monotonic()
        if self.stopped():
            self._stop_at = min(self._stop_at, now + self._tell_seconds)
        if now >= self._stop_at:
            raise StoppedError(self.stop_text(whom))
        if now - self._began >= self._seconds:
            raise StartError(
                f"rank {self._rank} waited {self._seconds:g} s for {whom}; see the logs of launcher and ranks for the "
                "reason, or raise parallel.start_seconds if they only start slowly"
            )
        if now >= self._say_at:
            self._say_at = now + SAY_SECONDS
            logger.warning("waiting for %s since %.0f s, for at most %.0f s", whom, now - self._began, self._seconds)
        time.sleep(POLL_SECONDS)

    def stop_text(self, whom: str) -> str:
        return f"stopped on request while rank {self._rank} waited for {whom}; start the run again later"

    def again(self) -> "StartWait":
        """Returns a new wait of the same length that ignores stop signals."""
        return StartWait(self._rank, self._seconds)


@dataclass(frozen=True)
class Greeting:
    """Rank 0's message to each rank that connects.

    Attributes:
        attempt_id: The attempt's name for all ranks.
        world_size: WORLD_SIZE of rank 0.
        host, folder: Rank 0's host, and the path of the run folder on it.
        key: Random name that identifies this start.
    """

    attempt_id: str
    world_size: int
    host: str
    folder: str
    key: str

    def probe(self, run_folder: Path) -> Path:
        """Returns the path of the file that rank 0 writes into the run folder. All other ranks check that they see it."""
        return run_folder / f".shared_{self.key}"

    def difference(self, env: RankEnv, run_folder: Path) -> str:
        """Returns the reason why this rank cannot start together with rank 0; empty if it can. With several nodes, waits up
        to SHARED_SECONDS for the file `probe`. If each node had a local folder instead of one shared folder, a checkpoint's
        files would be scattered over the nodes, and it could not be loaded."""
        here = f"rank {env.rank} on {socket.gethostname()}"
        if env.world_size != self.world_size:
            return f"WORLD_SIZE={env.world_size} for {here}, {self.world_size} for rank 0 on {self.host}; start all alike"
        if env.launched and env.attempt_id != self.attempt_id:
            return (
                f"MOE_DIST_ATTEMPT_ID={env.attempt_id!r} for {here}, {self.attempt_id!r} for rank 0 on {self.host}: the "
                "ranks belong to two starts; start all ranks alike"
            )
        deadline = time.monotonic() + SHARED_SECONDS
        # each round costs one stat on the file system
        while env.local_world_size < env.world_size and not self.probe(run_folder).exists():
            if time.monotonic() >= deadline:
                what = "is another folder" if run_folder.exists() else "does not exist"
                return (
                    f"{here} does not see {self.probe(run_folder).name}, which rank 0 on {self.host} wrote into "
                    f"{self.folder}: on this node {run_folder} {what}; run.root must be a folder that all nodes share"
                )
            time.sleep(POLL_SECONDS)
        return ""


def ranks_text(ranks: Iterable[int]) -> str:
    """Returns a phrase with the ranks: 'rank 3', 'ranks 1, 2', or 'ranks 1, 2, ... and 56 more'."""
    found = sorted(ranks)
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return f"rank{'s' if len(found) > 1 else ''} {', '.join(map(str, found[:_SHOWN]))}{more}"


def address_file(run_folder: Path) -> Path:
    return run_folder / "rendezvous.json"


def listening_host(env: RankEnv, variables: Mapping[str, str]) -> str:
    """Returns the address at which rank 0 listens. It is the loopback address if all ranks are on this node and
    MOE_DIST_RENDEZVOUS_HOST is not set, otherwise `node_address`."""
    if env.local_world_size == env.world_size and not variables.get(HOST_VARIABLE):
        return "127.0.0.1"  # no other machine can connect
    return node_address(variables)


def node_address(variables: Mapping[str, str]) -> str:
    """Returns the address at which other nodes can reach this node. It comes from MOE_DIST_RENDEZVOUS_HOST (a name or
    address of this node), else from the interface GLOO_SOCKET_IFNAME, else from the host name. Raises ConfigError if none
    of these gives a reachable address."""
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
    """Listens at a free port of `host`, writes the address to `path`, and returns the address and the socket. Rank 0 calls
    this function. Only this user can read the file.

    Raises:
        ResourceError: `host` is not an address of this node.
        OSError: the file cannot be written.
    """
    try:
        # The kernel chooses the port. The socket stays open, so that no other process can take the port.
        listener = socket.create_server((host, 0))
    except OSError as error:
        raise ResourceError(
            f"rank 0 cannot listen at {host}: {error.strerror}; set {HOST_VARIABLE} to an address of its node"
        ) from error
    port, secret = listener.getsockname()[1], secrets.token_hex(16)  # a new secret for each attempt
    address = Address(env.attempt_id, host, port, secret)
    try:
        write_atomically(path, json.dumps(asdict(address)), mode=0o600)
    except BaseException:
        listener.close()
        raise
    return address, listener


def find(path: Path, env: RankEnv, wait: StartWait) -> Address:
    """Waits for the address of this attempt. All ranks except rank 0 call this function. Raises the errors of `wait`, and
    ConfigError if the file belongs to another user or is accessible to other users."""
    while True:
        address = _read(path)
        if address is not None and address.attempt_id == env.attempt_id:
            return address
        there = f"; the file there is of attempt {address.attempt_id}" if address is not None else ""
        there = there if path.parent.exists() else "; this node has no such folder yet"
        wait.pause(f"rank 0, whose address must come into {path} (attempt {env.attempt_id}{there})")  # reads a small file


def withdraw(path: Path, address: Address) -> None:
    """Deletes the file with the address. Rank 0 calls this function after all ranks have connected."""
    if _read(path) == address:  # a later attempt may have replaced the file
        path.unlink(missing_ok=True)


def _read(path: Path) -> Address | None:
    """Returns the published address; None if there is no valid file."""
    try:
        stream = open_regular(path, links=False)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; it must be a regular file of this user; delete it") from error
    with stream:
        found = os.fstat(stream.fileno())  # the owner of the open file, which nobody can replace
        ours = found.st_uid in (os.geteuid(), path.parent.stat().st_uid)  # the folder's owner was checked at the start
        if not ours or found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(
                f"{path}: belongs to {user_name(found.st_uid)} with mode {stat.S_IMODE(found.st_mode):04o}; it must belong "
                "to the user of the ranks with mode 0600; delete it"
            )
        try:
            return Address(**json.loads(stream.read(MOST_BYTES)))
        except (ValueError, TypeError, RecursionError):  # not JSON, or with the fields of another version
            return None


def _resolve(name: str, what: str) -> str:
    try:
        return str(socket.getaddrinfo(name, None, socket.AF_INET, socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(f"{what}: {error}; set {HOST_VARIABLE} to an IPv4 address of rank 0's node") from error
