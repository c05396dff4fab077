"""A lease file that ensures a single writer per run folder. The writer renews the lease, and checks it before each commit.

The holder creates the file with O_EXCL, and a thread writes a heartbeat counter into it. Another process may replace the
file, by a rename, if the counter has not changed for `stale_seconds`, or if the holder ran on this machine and is dead. A
suspended holder that wakes up later writes into the old, unlinked file, and its next `check` fails. flock is not used,
because network file systems implement it differently.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from moe_dist.config.regular_file import IrregularFileError, read_regular
from moe_dist.errors import MoeDistError, StoppedError

STALE_SECONDS = 30.0
WAIT_SECONDS = 90.0
_BEAT_DIGITS = 12


class LeaseError(MoeDistError):
    """Another attempt writes to this run folder."""


@dataclass(frozen=True)
class Holder:
    """A process that has a lease.

    Attributes:
        attempt_id: Name of the attempt, equal on all its ranks.
        host, pid, since: Host, process id, and Unix seconds of the acquisition by the host's clock; shown in messages.
        machine: Identity of the kernel and pid namespace. Pids are comparable only if this identity is equal.
        born: Start time of the process in clock ticks. A later process with the same pid has a different start time.
        token: Random text that is unique for each acquisition.
    """

    attempt_id: str
    host: str
    pid: int
    machine: str
    born: str
    token: str
    since: float = 0.0

    @classmethod
    def this_process(cls, attempt_id: str) -> "Holder":
        pid = os.getpid()
        return cls(attempt_id, socket.gethostname(), pid, _machine(), _born(pid), uuid.uuid4().hex, time.time())

    def is_dead(self) -> bool:
        """Returns True if the process has certainly ended; False on another machine, where its pid has no meaning."""
        return self.machine != "" and self.machine == _machine() and _born(self.pid) != self.born

    def __str__(self) -> str:
        since = f", since {time.strftime('%F %T %z', time.localtime(self.since))}" if self.since else ""
        return f"attempt {self.attempt_id}, process {self.pid} on {self.host}{since}"


def read_holder(path: Path) -> Holder | None:
    """Returns the holder of the lease file at `path`; None if there is no lease."""
    return _read(path)[0]


class Lease:
    """The right to write to a run folder. Only rank 0 of an attempt acquires it.

    Args:
        path: The lease file, which must be on the file system of the run folder.
        stale_seconds: Time without a heartbeat after which a lease counts as abandoned. The holder sends six heartbeats in
            this time.
    """

    def __init__(self, path: Path, attempt_id: str, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.path, self._stale_seconds = path, stale_seconds
        self._me = Holder.this_process(attempt_id)
        self._fd = -1
        self._beats = 0
        self._ended = threading.Event()
        self._closing = threading.Lock()  # prevents the thread from writing to a closed and reused descriptor

    def acquire(
        self,
        wait_seconds: float = WAIT_SECONDS,
        *,
        on_wait: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> "Lease":
        """Waits until the current holder has released or abandoned the lease, takes it, and starts the heartbeat thread.

        Args:
            on_wait: Called once with a message, before the wait.
            stopped: Polled during the wait. If it returns True, the wait ends.

        Raises:
            LeaseError: another process still holds the lease after `wait_seconds`.
            StoppedError: `stopped` returned True.
        """
        deadline = time.monotonic() + wait_seconds
        seen, since = _read(self.path), time.monotonic()
        while not self._try_create():  # O_EXCL lets only one of several processes succeed
            now = time.monotonic()
            if (current := _read(self.path)) != seen:
                seen, since = current, now  # the holder has sent a heartbeat, or another process has the lease now
            holder = current[0]
            dead = holder is not None and holder.is_dead()
            # Staleness is measured with this host's clock only, because the clocks of two hosts may differ.
            if (dead or now - since >= self._stale_seconds) and self._take_over(seen):
                break
            writer = f"{holder or 'another attempt'} writes to this run"
            if now >= deadline:
                raise LeaseError(
                    f"{self.path}: {writer} and did not end within {wait_seconds:g} s; stop it, or choose another "
                    f"run.name; if that process no longer exists, delete {self.path}*"
                )
            if stopped is not None and stopped():
                raise StoppedError(f"stopped on request while {writer}; start the run again later")
            if on_wait is not None:
                on_wait(
                    f"{self.path.parent}: {writer}; waiting up to {wait_seconds:g} s for it to end, or for "
                    f"{self._stale_seconds:g} s without a heartbeat"
                )
                on_wait = None  # called only once
            time.sleep(min(0.2, self._stale_seconds / 6))
        threading.Thread(target=self._keep_warm, name="lease", daemon=True).start()  # the main thread may block for minutes
        return self

    def renew(self) -> None:
        """Writes the next heartbeat into the file that this process created, even if it has been replaced since."""
        self._beats += 1
        # Errors are ignored: `check` reports a lost file, and on a full disk the same bytes can still be overwritten.
        with self._closing, contextlib.suppress(OSError):
            beat = f"{self._beats:0{_BEAT_DIGITS}d}"  # fixed width, so that a reader never sees a mix of two heartbeats
            os.pwrite(self._fd, beat.encode(), 0)

    def check(self) -> None:
        """Raises LeaseError if another attempt has taken over the lease, because this attempt must not write any more. Call
        this method right before each commit."""
        try:
            holder = read_holder(self.path)  # costs one read of a small file
        except IrregularFileError:  # somebody has replaced the file by a link or a device
            holder = None
        if holder != self._me:  # also compares the token, which is new in each lease
            raise LeaseError(
                f"{self.path}: this process ({self._me}) lost the lease to {holder or 'somebody who deleted it'}; it sent "
                "no heartbeat for too long (suspended, or its file system hung) and must not write any more; start the run "
                "again"
            )

    def release(self) -> None:
        """Deletes the lease if it still belongs to this process. A second call does nothing."""
        self._ended.set()  # stops the heartbeat before the file is deleted
        with self._closing:
            if self._fd < 0:
                return
            if read_holder(self.path) == self._me:
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1

    def _keep_warm(self) -> None:
        while not self._ended.wait(self._stale_seconds / 6):
            self.renew()

    def _content(self) -> bytes:
        return f"{0:0{_BEAT_DIGITS}d}\n{json.dumps(asdict(self._me))}\n".encode()

    def _try_create(self) -> bool:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            return False
        os.pwrite(fd, self._content(), 0)
        self._fd = fd
        return True

    def _take_over(self, stale: tuple[Holder | None, bytes]) -> bool:
        """Replaces a stale lease. If several processes try this, O_EXCL lets only one of them create the file `claim`. That
        process reads the lease again before it replaces the lease."""
        token = stale[0].token if stale[0] is not None else "unreadable"
        claim = self.path.with_name(f"{self.path.name}.{token}")
        try:
            fd = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._remove_if_dead(claim)
            return False  # another process is taking over the lease, or died before its rename
        if _read(self.path) != stale:  # the holder has sent a heartbeat in the meantime
            os.close(fd)
            claim.unlink()
            return False
        os.pwrite(fd, self._content(), 0)
        try:
            os.replace(claim, self.path)  # atomic; a suspended old holder that wakes up writes into the unlinked file
        except FileNotFoundError:  # another process deleted the claim, believing that this process is dead
            os.close(fd)
            return False
        self._fd = fd
        return True

    def _remove_if_dead(self, claim: Path) -> None:
        """Deletes the file `claim` of a process that was killed before its rename. The claim is renamed first, so that only
        one process deletes it. If a live process's new claim is deleted by mistake, this process notices it at its rename
        and tries again."""
        claimer = read_holder(claim)
        if claimer is None or not claimer.is_dead():
            return
        aside = claim.with_name(f"{claim.name}.{self._me.token}")  # a name that only this process uses
        with contextlib.suppress(FileNotFoundError):
            os.rename(claim, aside)
            aside.unlink()


def _read(path: Path) -> tuple[Holder | None, bytes]:
    """Returns the holder and the heartbeat counter. The holder is None if the file is missing or incomplete."""
    try:
        beat, _, record = read_regular(path, most_bytes=1 << 16, links=False).partition(b"\n")
        return Holder(**json.loads(record)), beat
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        return None, b""


def _machine() -> str:
    """Returns this process's boot id and pid namespace; empty if there is no /proc."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _born(pid: int) -> str:
    """Returns a process's start time, field 22 of /proc/PID/stat; empty if the process is missing or a zombie."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]  # a zombie has ended
    return ""
