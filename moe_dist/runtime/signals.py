"""Stop signals, and children that never outlive their parent. Imports the standard library only, so that handlers stand
before torch is imported.

TERM, USR2 and INT, in any mix and any number, are one request: they set a flag, and the loop acts on it between steps. A
signal that arrives while the main thread waits inside a collective does not run its Python handler until that returns;
therefore a thread reads the wakeup descriptor, which the C handler writes at once, and holds the timer that ends the
process if the loop does not get there within the grace.
"""

import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

from moe_dist.errors import EXIT_FAILED

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
DEFAULT_GRACE_SECONDS = 300.0
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """One request to stop, however many signals carry it.

    `install` is called in the main thread, once, as the first thing a rank does. Ranks hear of a stop at different steps:
    the loop must vote on `requested` over all ranks before it acts.

    Args:
        grace_seconds: Time from the first signal until the process is ended if it has not ended by itself.
        on_expire: Called by the timer's thread just before that; it must not touch the process group.
    """

    def __init__(self, grace_seconds: float = DEFAULT_GRACE_SECONDS, on_expire: Callable[[], None] | None = None) -> None:
        self.grace_seconds = grace_seconds
        self.on_expire = on_expire
        self._first: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1

    @property
    def requested(self) -> bool:
        """Whether a stop signal has come. Costs nothing: a look at an attribute, no collective."""
        return self._first is not None

    @property
    def reason(self) -> str:
        """The first signal's name; empty without a request."""
        return self._first.name if self._first is not None else ""

    def install(self) -> "StopRequest":
        """Puts the handlers in place; a second call changes nothing.

        Raises:
            ValueError: called outside the main thread.
        """
        if self._pipe is not None:
            return self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        self._previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._pipe = (read_end, write_end)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._watch, args=(read_end,), name="stop-request", daemon=True).start()
        unblock_stop_signals()
        return self

    def uninstall(self) -> None:
        """Puts the earlier handlers back and disarms the timer."""
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # what signal.signal gave us
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._pipe[1])  # the watcher reads the end of the pipe and leaves
        self._pipe = None

    def __enter__(self) -> "StopRequest":
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.uninstall()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or signal.Signals(number)

    def _watch(self, read_end: int) -> None:
        timer: threading.Timer | None = None
        while received := os.read(read_end, 64):
            for number in received:
                if timer is None and number in STOP_SIGNALS:
                    self._first = self._first or signal.Signals(number)
                    timer = threading.Timer(self.grace_seconds, self._expire)
                    timer.daemon = True
                    timer.start()
        if timer is not None:
            timer.cancel()
        os.close(read_end)

    def _expire(self) -> None:
        try:
            sys.stderr.write(
                f"{self.reason} came {self.grace_seconds:g} s ago and the run has not stopped; ending it here:\n"
            )
            faulthandler.dump_traceback(all_threads=True)
            if self.on_expire is not None:
                self.on_expire()
        finally:
            os._exit(EXIT_FAILED)  # the main thread may hang in a collective: no handler, no atexit, would ever run


def unblock_stop_signals() -> None:
    """Lets in what has waited: a launcher may start a process with the stop signals blocked, so that none is lost, or ends
    it, before its handlers stand. Call it when they do."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _load_prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)
    return prctl


def child_of(parent_pid: int, *, ignore_stop: bool) -> Callable[[], None]:
    """Makes the function that a child process calls first: as `preexec_fn`, or at the start of a worker.

    The child is killed by the kernel when the thread that started it ends, so start children from the main thread. All
    lookups happen here, in the parent: between fork and exec only the system calls are left.

    Args:
        parent_pid: The parent's process id; a child that finds another parent was orphaned before it got here, and ends.
        ignore_stop: Whether the child ignores the stop signals (workers of a rank do; the ranks themselves do not).
    """
    prctl = _load_prctl()

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent_pid:
            os._exit(EXIT_FAILED)
        if ignore_stop:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)

    return prepare
