"""The process between a Ray actor and its rank, which starts the rank, forwards signals, and kills the rank's processes.

    python -m launchers.ray.rank_supervisor <started by launchers/ray/rank.py>

    standard input     one line of JSON, the arguments of `RankSupervisor`; then one signal name per line
    standard output    {"pid": ...} once the rank runs, {"code": ...} when it has ended
    standard error     the output of rank 0

A killed Ray worker cannot clean up, and neither Ray nor PDEATHSIG reaches a process that a rank started in a new session.
The supervisor survives the worker, because it runs in its own session, and becomes the parent of a rank's orphaned
processes (PR_SET_CHILD_SUBREAPER). When the actor ends for any reason, the supervisor's standard input closes. The
supervisor then kills the rank and all processes that the rank started.
"""

import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

import psutil

from moe_dist.runtime.signals import STOP_SIGNALS, child_of

_PR_SET_CHILD_SUBREAPER = 36
TICK_SECONDS = 0.1
LINGER_SECONDS = 2.0  # seconds from the end of the rank until its remaining child processes are killed
ADOPTED_SECONDS = 10.0  # seconds to wait until killed processes have disappeared


class RankSupervisor:
    """Runs one rank, and waits until all processes that the rank started have ended.

    Args:
        log: File to which the output is appended.
        shown: True for rank 0. Its standard output and standard error go to the driver; standard error also to the log.
        scratch: Folder that is deleted at the end; '' for none.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: str, shown: bool, scratch: str) -> None:
        self._scratch = scratch
        self._code: int | None = None
        self._inputs: list[int] = [0]
        with open(log, "ab", buffering=0) as file:
            self._log: IO[bytes] | None = open(os.dup(file.fileno()), "ab", buffering=0) if shown else None  # noqa: SIM115
            self._rank = subprocess.Popen(
                argv,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=2 if shown else file,  # standard output (1) carries the messages to the actor
                stderr=subprocess.PIPE if shown else file,
                preexec_fn=child_of(os.getpid(), ignore_stop=False),  # PDEATHSIG, in case the supervisor is killed
            )
        if self._rank.stderr is not None:
            self._inputs.append(self._rank.stderr.fileno())

    def keep(self) -> None:
        """Blocks until all processes of the rank are gone."""
        _report(pid=self._rank.pid)
        while self._code is None and 0 in self._inputs:
            self._look(TICK_SECONDS)
        if self._code is None:  # the actor has ended
            self._rank.send_signal(signal.SIGKILL)
        else:
            _report(code=self._code)
        self._end_the_adopted(time.monotonic() + (LINGER_SECONDS if 0 in self._inputs else 0.0))
        while self._look(0.0):  # reads all messages that are still in the pipe
            pass
        if self._scratch:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def _look(self, seconds: float) -> bool:
        """Waits for input and reaps ended children; returns True if there was input."""
        ready, _, _ = select.select(self._inputs, [], [], seconds)  # one thread serves all inputs
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
            if self._code is None:  # sent only while the rank runs, because another process may reuse an ended rank's pid
                os.kill(self._rank.pid, signal.Signals[name])  # the rank's main thread handles the signal

    def _show(self, text: bytes) -> None:
        with contextlib.suppress(OSError):  # the disk may be full
            if self._log is not None:
                self._log.write(text)
        with contextlib.suppress(OSError):
            os.write(2, text)

    def _reap(self) -> bool:
        """Reaps all ended children; returns True if some still run."""
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)  # any child, also adopted orphans
                if pid == 0:
                    return True
                if pid == self._rank.pid:
                    self._code = self._rank.returncode = os.waitstatus_to_exitcode(status)
        return False

    def _end_the_adopted(self, kill_at: float) -> None:
        """Waits until `kill_at` for the rank's orphaned processes, which this process has adopted, then kills them."""
        while self._reap() and (now := time.monotonic()) < kill_at + ADOPTED_SECONDS:
            if now >= kill_at:
                for child in psutil.Process().children():  # scans /proc
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.kill()
            self._look(TICK_SECONDS / 5)


def _report(**values: Any) -> None:
    with contextlib.suppress(OSError):  # the actor may be gone
        os.write(1, json.dumps(values).encode() + b"\n")


def main() -> None:
    # The supervisor is a grandchild of the worker, because Ray kills the direct children of an ended worker.
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    os.setsid()  # leaves the process group that Ray kills
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)  # not SIG_IGN, because the rank would inherit SIG_IGN
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    line = b""
    while not line.endswith(b"\n"):  # reads byte by byte, because `select` would not see input in a buffer
        byte = os.read(0, 1)
        if not byte:
            return
        line += byte
    RankSupervisor(**json.loads(line)).keep()


if __name__ == "__main__":
    sys.exit(main())
