"""One writer a run folder: a lease file that the writer keeps warm and that is looked at before each commit.

The file is made with O_EXCL and carries a token of its maker, which holds it open and writes a beat into it, through the
open descriptor, from a thread. Whoever finds the beat unchanged for `stale_seconds` of its own clock (the clocks of hosts
differ), or finds the maker dead on its own machine, replaces the file by a rename. A maker that was only asleep then beats
into a file without a name, does no harm, and its next `check` is refused. No flock: network file systems differ about it.
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

from moe_dist.errors import MoeDistError, StoppedError

STALE_SECONDS = 30.0
WAIT_SECONDS = 90.0
_BEAT_DIGITS = 12


class LeaseError(MoeDistError):
    """Another attempt writes to this run folder."""


@dataclass(frozen=True)
class Holder:
    """Who wrote a lease.

    Attributes:
        attempt_id: Of the attempt, equal on all its ranks.
        host, pid: Where the writer runs, for people.
        machine: Identity of the kernel and process-id namespace; pids compare only where it is equal.
        born: Start time of the process in clock ticks, so that a reused pid is not taken for it.
        token: Unique to this acquisition.
        since: When it was made, Unix seconds of that host's clock, for people.
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
        """Whether it is known to have ended; False where that cannot be told from here."""
        return self.machine != "" and self.machine == _machine() and _born(self.pid) != self.born

    def __str__(self) -> str:
        since = f", since {time.strftime('%F %T %z', time.localtime(self.since))}" if self.since else ""
        return f"attempt {self.attempt_id}, process {self.pid} on {self.host}{since}"


def read_holder(path: Path) -> Holder | None:
    """Who holds the lease file at `path`; None where nobody does."""
    return _read(path)[0]


class Lease:
    """The right to write to a run folder. Rank 0 holds it; the other ranks never do.

    Args:
        path: The lease file, on the file system of the run folder.
        attempt_id: Name of the attempt.
        stale_seconds: A beat unchanged for so long means that its writer is gone. It beats six times as often.
    """

    def __init__(self, path: Path, attempt_id: str, *, stale_seconds: float = STALE_SECONDS) -> None:
        self.path, self._stale_seconds = path, stale_seconds
        self._me = Holder.this_process(attempt_id)
        self._fd = -1
        self._beats = 0
        self._ended = threading.Event()
        self._closing = threading.Lock()  # the thread must not write to a descriptor that was closed and given out again

    def acquire(
        self,
        wait_seconds: float = WAIT_SECONDS,
        *,
        on_wait: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> "Lease":
        """Takes the lease, waiting for a holder to leave or to go stale; then keeps it warm from a thread.

        Args:
            on_wait: Told once, before the first wait, for whom and how long.
            stopped: Looked at while waiting.

        Raises:
            LeaseError: somebody else still holds it after `wait_seconds`.
            StoppedError: `stopped` said so.
        """
        deadline = time.monotonic() + wait_seconds
        told = on_wait is None or wait_seconds <= 0.0
        seen, since = _read(self.path), time.monotonic()
        while not self._try_create():
            now = time.monotonic()
            if (current := _read(self.path)) != seen:
                seen, since = current, now
            holder = current[0]
            dead = holder is not None and holder.is_dead()
            if (dead or now - since >= self._stale_seconds) and self._take_over(seen):
                break
            if now >= deadline:
                raise LeaseError(
                    f"{self.path}: {holder or 'another attempt'} writes to this run and did not leave within "
                    f"{wait_seconds:g} s; stop it, or choose another run.name; if that process is surely gone, remove "
                    f"{self.path}*"
                )
            if stopped is not None and stopped():
                raise StoppedError(
                    f"stopped on request while {holder or 'another attempt'} writes to this run; start me again"
                )
            if not told and on_wait is not None:
                told = True
                on_wait(
                    f"{self.path.parent}: {holder or 'another attempt'} writes to this run; waiting up to {wait_seconds:g} "
                    f"s for it to end, or for {self._stale_seconds:g} s of silence"
                )
            time.sleep(min(0.2, self._stale_seconds / 6))
        threading.Thread(target=self._keep_warm, name="lease", daemon=True).start()
        return self

    def renew(self) -> None:
        """Writes the next beat. Goes to the file we made, whatever its name points to by now."""
        self._beats += 1
        # A lost file or a full disk raises OSError: `check` tells of the first, the second is no loss.
        with self._closing, contextlib.suppress(OSError):
            os.pwrite(self._fd, f"{self._beats:0{_BEAT_DIGITS}d}".encode(), 0)

    def check(self) -> None:
        """Call right before each commit; reads one small file.

        Raises:
            LeaseError: another attempt has taken over: this one must not write any more.
        """
        holder = read_holder(self.path)
        if holder != self._me:
            raise LeaseError(
                f"{self.path}: this process ({self._me}) lost the lease to {holder or 'somebody who removed it'}; it was "
                "silent for too long (suspended, or its file system hung) and writes nothing any more"
            )

    def release(self) -> None:
        """Gives the lease back if it is still ours; a second call does nothing."""
        self._ended.set()
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
        """Replaces a stale lease. Of several that try, one makes the claim; it looks once more before it replaces."""
        token = stale[0].token if stale[0] is not None else "unreadable"
        claim = self.path.with_name(f"{self.path.name}.{token}")
        try:
            fd = os.open(claim, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            self._remove_if_dead(claim)
            return False  # somebody else is doing it, or was
        if _read(self.path) != stale:
            os.close(fd)
            claim.unlink()
            return False
        os.pwrite(fd, self._content(), 0)
        try:
            os.replace(claim, self.path)
        except FileNotFoundError:  # taken for a dead one's
            os.close(fd)
            return False
        self._fd = fd
        return True

    def _remove_if_dead(self, claim: Path) -> None:
        """Removes the claim of a process that was killed before it came to the rename. Moved first: of several that see it
        dead one gets it, and whoever has made a new one meanwhile finds it gone and tries again."""
        claimer = read_holder(claim)
        if claimer is None or not claimer.is_dead():
            return
        aside = claim.with_name(f"{claim.name}.{self._me.token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(claim, aside)
            aside.unlink()


def _read(path: Path) -> tuple[Holder | None, bytes]:
    """The holder and the beat. A file that is absent, or still being written, has no holder."""
    try:
        beat, _, record = path.read_bytes().partition(b"\n")
        return Holder(**json.loads(record)), beat
    except (FileNotFoundError, ValueError, TypeError):
        return None, b""


def _machine() -> str:
    """Boot id and process-id namespace; empty where there is no /proc."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    return ""


def _born(pid: int) -> str:
    """Start time of a process, field 22 of /proc/PID/stat; empty where there is none, or only its exit status is left."""
    with contextlib.suppress(OSError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else fields[18]
    return ""
