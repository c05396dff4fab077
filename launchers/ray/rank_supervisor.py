"""Between an actor of Ray and its rank: starts the rank, passes signals on to it, and leaves nothing of it behind.

    python -m launchers.ray.rank_supervisor <started by launchers/ray/rank.py>

    standard input     one line of JSON, an `Order`; then the names of signals for the rank, one a line
    standard output    {"pid": ...} once the rank runs, {"code": ...} when it has ended
    standard error     where rank 0 is shown

A worker of Ray that is killed can do nothing any more, and neither what Ray does at its end nor PDEATHSIG reaches a process
that a rank has put into a session of its own. So the keeper outlives both: it is in a session of its own too, adopts
whatever the rank starts and leaves (PR_SET_CHILD_SUBREAPER), and when its standard input ends, which happens however the
actor ends, kills the rank and all of them.
"""

import contextlib
import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from moe_dist.runtime.signals import STOP_SIGNALS, child_of

_PR_SET_CHILD_SUBREAPER = 36
TICK_SECONDS = 0.1
LINGER_SECONDS = 2.0  # that what a rank has started may go on after its end
ADOPTED_SECONDS = 10.0  # for the kernel to end what was killed


@dataclass(frozen=True)
class Order:
    """What to start.

    Attributes:
        argv: Program and arguments.
        env: Its whole environment.
        log: File that its output is added to.
        shown: Whether it is rank 0: its standard output is shown, its standard error is shown and goes into the log.
    """

    argv: Sequence[str]
    env: Mapping[str, str]
    log: str
    shown: bool

    def line(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"


class RankSupervisor:
    """One rank from its start to the end of the last process it has started."""

    def __init__(self, order: Order) -> None:
        self._code: int | None = None
        self._inputs: list[int] = [0]
        with open(order.log, "ab", buffering=0) as log:
            self._log: IO[bytes] | None = open(os.dup(log.fileno()), "ab", buffering=0) if order.shown else None  # noqa: SIM115
            self._rank = subprocess.Popen(
                order.argv,
                env=order.env,
                stdin=subprocess.DEVNULL,
                stdout=2 if order.shown else log,  # ours is the actor's
                stderr=subprocess.PIPE if order.shown else log,
                preexec_fn=child_of(os.getpid(), ignore_stop=False),
            )
        if self._rank.stderr is not None:
            self._inputs.append(self._rank.stderr.fileno())

    def keep(self) -> None:
        """Returns when nothing of the rank is left."""
        _report(pid=self._rank.pid)
        while self._code is None and 0 in self._inputs:
            self._look(TICK_SECONDS)
        if self._code is None:  # the actor is gone
            self._rank.send_signal(signal.SIGKILL)
        else:
            _report(code=self._code)
        self._end_the_adopted(time.monotonic() + (LINGER_SECONDS if 0 in self._inputs else 0.0))
        while self._look(0.0):  # what is left in the pipe
            pass

    def _look(self, seconds: float) -> bool:
        """Waits for input and collects ends; whether there was input."""
        ready, _, _ = select.select(self._inputs, [], [], seconds)
        for descriptor in ready:
            read = os.read(descriptor, 1 << 16)
            if not read:
                self._inputs.remove(descriptor)
            elif descriptor == 0:
                self._pass_on(read.decode().split())
            else:
                self._show(read)
        self._reap()
        return bool(ready)

    def _pass_on(self, names: Sequence[str]) -> None:
        for name in names:
            if self._code is None:  # else its pid may have been given out again
                os.kill(self._rank.pid, signal.Signals[name])

    def _show(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # a full disk
            if self._log is not None:
                self._log.write(text)
        with contextlib.suppress(OSError):
            os.write(2, text)

    def _reap(self) -> bool:
        """Collects all children that have ended; whether some are left."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:
                    return True
                if pid == self._rank.pid:
                    self._code = self._rank.returncode = os.waitstatus_to_exitcode(status)
        return False

    def _end_the_adopted(self, kill_at: float) -> None:
        """Waits until `kill_at` for all that is left to end, then kills it: whose parent ends becomes our child."""
        while self._reap() and (now := time.monotonic()) < kill_at + ADOPTED_SECONDS:
            if now >= kill_at:
                for pid in _children():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            self._look(TICK_SECONDS / 5)


def _children() -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for entry in os.listdir("/proc"):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{int(entry)}/stat") as stat:
            if int(stat.read().rpartition(")")[2].split()[1]) == os.getpid():
                found.append(int(entry))
    return found


def _report(**values: Any) -> None:
    with contextlib.suppress(OSError):  # the actor may be gone
        os.write(1, json.dumps(values).encode() + b"\n")


def main() -> None:
    # Ray kills the children of a worker that ends, but not theirs: the first process only waits.
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the rank would inherit
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):  # byte by byte: what follows is read with select
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    RankSupervisor(Order(**json.loads(line))).keep()


if __name__ == "__main__":
    sys.exit(main())
