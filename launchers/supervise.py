"""Start ranks on this machine and see them through: forward a stop, end all when one fails, leave none behind.

Ranks are children of the main thread with PDEATHSIG: however the launcher ends, the kernel ends them too. One thread a
rank waits for its end, so that the order in which ranks end is known; the first to fail is the cause, the others follow.
"""

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from launchers.command import RankCommand
from launchers.ending import Outcome, RankTracker, ShutdownTimeouts
from moe_dist.runtime.signals import STOP_SIGNALS, child_of, unblock_stop_signals

TICK_SECONDS = 0.1
HELD_SECONDS = (
    0.5  # standard error of rank 0 is shown so much later: by then it is known whether its end has a cause elsewhere
)


class StopSignals:
    """Counts the stop signals that reach the launcher, inside a `with` block of the main thread."""

    def __init__(self) -> None:
        self.first: signal.Signals | None = None
        self.interrupts = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        unblock_stop_signals()
        return self

    def renew(self) -> None:
        """Puts the handlers in place again, after what has handlers of its own (Ray's connection to a cluster)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal gave us

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number)
        self.interrupts += number == signal.SIGINT


class HeldStderr:
    """Copies a rank's standard error into its log at once, and to the terminal a little later, or never."""

    def __init__(self, source: IO[bytes], log: IO[bytes], terminal: IO[bytes]) -> None:
        self._source, self._log, self._terminal = source, log, terminal
        self._held: deque[tuple[float, bytes]] = deque()
        # A progress bar may stand on the line where we write: clear it, the bar is drawn anew below.
        self._clear = b"\r\x1b[K" if terminal.isatty() else b""
        self._thread = threading.Thread(target=self._copy, name="stderr", daemon=True)
        self._thread.start()

    def show(self, *, at_least: float) -> None:
        """Shows what is held for so many seconds."""
        now = time.monotonic()
        while self._held and now - self._held[0][0] >= at_least:
            self._terminal.write(self._clear + self._held.popleft()[1])
            self._terminal.flush()

    def say(self, text: str) -> None:
        """Shows a line of the launcher's own at once."""
        self._terminal.write(self._clear + text.encode() + b"\n")
        self._terminal.flush()

    def finish(self, *, show: bool) -> None:
        """Reads what is left, and shows or drops all that is held. The rank has ended."""
        self._thread.join(2.0)  # a grandchild may keep the pipe open
        if show:
            self.show(at_least=0.0)
        self._held.clear()

    def _copy(self) -> None:
        while chunk := os.read(self._source.fileno(), 1 << 16):
            self._held.append((time.monotonic(), chunk))
            # On a full disk the words still reach the terminal, and above all the pipe is read on: the rank never waits.
            with contextlib.suppress(OSError):
                self._log.write(chunk)


class Ranks:
    """The ranks of a run on this machine, from start to end.

    Args:
        commands: One a rank.
        logs: For each rank its log file, opened for appending, without a buffer.
        timeouts: How long things may take.
        base_env: Environment that the commands' variables go on top of.
        terminal: Where standard error of rank 0 is shown.
    """

    def __init__(
        self,
        commands: Sequence[RankCommand],
        logs: Sequence[IO[bytes]],
        *,
        timeouts: ShutdownTimeouts,
        base_env: Mapping[str, str] = os.environ,
        terminal: IO[bytes] | None = None,
    ) -> None:
        self._course = RankTracker(len(commands), timeouts)
        self._ends: queue.SimpleQueue[int] = queue.SimpleQueue()
        self._ranks: list[subprocess.Popen[bytes]] = []
        prepare = child_of(os.getpid(), ignore_stop=False)
        try:
            for command, log in zip(commands, logs, strict=True):
                self._ranks.append(_start(command, log, base_env, prepare))
        except BaseException:
            self.kill()
            raise
        # Only now threads: none may exist while we fork.
        stderr = self._ranks[0].stderr
        assert stderr is not None
        self._stderr = HeldStderr(stderr, logs[0], terminal or sys.stderr.buffer)
        for rank, pid in enumerate(self.pids):
            threading.Thread(target=self._wait_for, args=(rank, pid), name=f"rank{rank}", daemon=True).start()

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._ranks]

    def see_through(self, signals: StopSignals) -> Outcome:
        """Blocks until all ranks have ended."""
        course, forwarded = self._course, False
        try:
            while not course.over:
                self._note_ends()
                if signals.first is not None and not forwarded:
                    forwarded = True
                    self._send(signals.first)
                    again = "; Ctrl-C again ends now" if signals.first == signal.SIGINT else ""
                    self._stderr.say(f"{signals.first.name}: saving, then stopping{again}")
                    course.stop(time.monotonic())
                if signals.interrupts > 1:
                    course.abort(time.monotonic())
                self._end_the_late()
                if not course.failed:
                    self._stderr.show(at_least=HELD_SECONDS)
        finally:
            self.kill()
        self._stderr.finish(show=not course.failed)
        return course.outcome(signals.first)

    def kill(self) -> None:
        """Kills, by process id, every rank that still runs."""
        self._send(signal.SIGKILL)
        for process in self._ranks:
            process.wait()

    def _wait_for(self, rank: int, pid: int) -> None:
        # Leaves the reaping to the main thread, which also sends the signals: so none can go to a pid given out again.
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._ends.put(rank)

    def _note_ends(self) -> None:
        try:
            rank = self._ends.get(timeout=TICK_SECONDS)  # the main thread's handlers run during the wait
        except queue.Empty:
            return
        self._course.end(rank, self._ranks[rank].wait(), time.monotonic(), frozen=self._frozen)

    def _frozen(self) -> tuple[int, ...]:
        return tuple(rank for rank, pid in enumerate(self.pids) if is_stopped(pid))

    def _end_the_late(self) -> None:
        now = time.monotonic()
        if self._course.must_terminate(now):
            self._send(signal.SIGTERM)
        if self._course.must_kill(now):
            self._send(signal.SIGKILL)

    def _send(self, number: signal.Signals) -> None:
        for process in self._ranks:
            process.send_signal(number)  # does nothing for one that has ended


def _start(
    command: RankCommand, log: IO[bytes], base_env: Mapping[str, str], prepare: Callable[[], None]
) -> subprocess.Popen[bytes]:
    """Rank 0 has the terminal as standard output, for its progress bar, and a pipe as standard error; the others have
    their log as both."""
    first = command.rank == 0
    return subprocess.Popen(
        command.argv,
        env={**base_env, **command.env},
        stdin=subprocess.DEVNULL,
        stdout=None if first else log,
        stderr=subprocess.PIPE if first else log,
        preexec_fn=prepare,
    )


def is_stopped(pid: int) -> bool:
    """Whether a process stands still after SIGSTOP; False where that cannot be told."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False
