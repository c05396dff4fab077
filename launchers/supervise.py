"""Starts ranks on this machine and waits for them: forwards stop signals, and ends all ranks when one rank fails."""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import IO

from launchers.command import RankCommand
from launchers.memory_limit import MemoryLimit
from launchers.rank_tracker import Outcome, RankTracker, ShutdownTimeouts
from moe_dist.runtime.signals import StopSignals, child_of

TICK_SECONDS = 0.1
# Delay with which rank 0's standard error is shown. If another rank fails meanwhile, rank 0's follow-up errors are hidden.
HELD_SECONDS = 0.5


class DelayedStderr:
    """Copies a rank's standard error into its log without delay, and to the terminal later, when the owner calls `show`."""

    def __init__(self, source: IO[bytes], log: IO[bytes], terminal: IO[bytes]) -> None:
        self._source, self._log, self._terminal = source, log, terminal
        self._held: deque[tuple[float, bytes]] = deque()  # (time of arrival, output)
        # Erases the progress bar on the current line; the bar is drawn again below the text.
        self._clear = b"\r\x1b[K" if terminal.isatty() else b""
        self._thread = threading.Thread(target=self._copy, name="stderr", daemon=True)
        self._thread.start()

    def show(self, *, at_least: float) -> None:
        """Shows output that is at least `at_least` seconds old."""
        now = time.monotonic()
        while self._held and now - self._held[0][0] >= at_least:
            self._terminal.write(self._clear + self._held.popleft()[1])
            self._terminal.flush()

    def say(self, text: str) -> None:
        """Shows a line of the launcher without delay."""
        self._terminal.write(self._clear + text.encode() + b"\n")
        self._terminal.flush()

    def finish(self, *, show: bool) -> None:
        """Reads the rest of the pipe after the rank has ended. Shows the delayed output if `show`, else drops it."""
        self._thread.join(2.0)  # with a timeout, because a grandchild process may keep the pipe open
        if show:
            self.show(at_least=0.0)
        self._held.clear()

    def _copy(self) -> None:
        while chunk := os.read(self._source.fileno(), 1 << 16):
            self._held.append((time.monotonic(), chunk))
            with contextlib.suppress(OSError):  # keeps reading on a full disk, because a full pipe would block the rank
                self._log.write(chunk)


class Ranks:
    """The rank processes of one attempt on this machine.

    Args:
        logs: Log file of each rank, opened for appending without a buffer; None if ranks write to this process's output.
        terminal: Shows rank 0's standard error; the default is the launcher's own standard error.
    """

    def __init__(
        self,
        commands: Sequence[RankCommand],
        logs: Sequence[IO[bytes]] | None,
        *,
        timeouts: ShutdownTimeouts,
        terminal: IO[bytes] | None = None,
    ) -> None:
        self._ends: queue.SimpleQueue[int] = queue.SimpleQueue()  # ranks in the order in which they ended
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._memory = MemoryLimit()
        prepare = child_of(os.getpid(), ignore_stop=False)
        try:
            for command, log in zip(commands, logs or [None] * len(commands), strict=True):
                self._ranks.append(_start(command, log, prepare))
        except BaseException:
            self.kill()
            raise
        # Threads start only after all forks, because preexec_fn is not safe in a process with threads.
        stderr, say = self._ranks[0].stderr, partial(print, file=sys.stderr, flush=True)
        self._stderr = DelayedStderr(stderr, logs[0], terminal or sys.stderr.buffer) if logs and stderr else None
        self._tracker = RankTracker(len(commands), timeouts, self._stderr.say if self._stderr else say)
        for rank, pid in enumerate(self.pids):  # one waiting thread per rank records the order in which ranks end
            threading.Thread(target=self._wait_for, args=(rank, pid), name=f"rank{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._ranks]

    def supervise(self, signals: StopSignals) -> Outcome:
        """Blocks until all ranks have ended; returns how they ended."""
        tracker = self._tracker
        try:
            while not tracker.over:
                self._note_end()
                for number in tracker.signals_due(signals, time.monotonic()):
                    self._send(number)
                if self._stderr and not tracker.failed:
                    self._stderr.show(at_least=HELD_SECONDS)
        finally:
            self.kill()
        if self._stderr:
            self._stderr.finish(show=not tracker.failed)
        return tracker.outcome(signals.first)

    def kill(self) -> None:
        """Kills, by process id, every rank that still runs."""
        self._send(signal.SIGKILL)
        for process in self._ranks:
            process.wait()

    def _wait_for(self, rank: int, pid: int) -> None:
        # WNOWAIT leaves the zombie for the main thread, which sends the signals, so that no signal can hit a reused pid.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._ends.put(rank)

    def _note_end(self) -> None:
        with contextlib.suppress(queue.Empty):
            rank = self._ends.get(timeout=TICK_SECONDS)  # the main thread's signal handlers run during the wait
            code = self._ranks[rank].wait()
            words = self._memory.words() if code == -signal.SIGKILL else ""
            self._tracker.end(rank, code, time.monotonic(), frozen=self._frozen, words=words)

    def _frozen(self) -> tuple[int, ...]:
        return tuple(rank for rank, pid in enumerate(self.pids) if is_stopped(pid))

    def _send(self, number: signal.Signals) -> None:
        for process in self._ranks:
            process.send_signal(number)  # does nothing if the process was reaped


def _start(command: RankCommand, log: IO[bytes] | None, prepare: Callable[[], None]) -> subprocess.Popen[bytes]:
    """Starts a rank. Rank 0 keeps the launcher's standard output, where it draws its progress bar, and writes standard
    error to a pipe. Every other rank writes both to its log file. Without log files, all ranks keep both streams."""
    first = command.rank == 0
    return subprocess.Popen(
        command.argv,
        env={**os.environ, **command.env},
        stdin=subprocess.DEVNULL,  # ranks must not read the terminal
        stdout=None if first else log,  # None inherits the terminal
        stderr=subprocess.PIPE if first and log is not None else log,
        preexec_fn=prepare,  # sets PDEATHSIG: the kernel kills the rank when the launcher dies
    )


def is_stopped(pid: int) -> bool:
    """Returns whether SIGSTOP has suspended a process; False if /proc does not show the process."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
