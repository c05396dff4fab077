"""Stop signals, and child processes that end with their parent. Imports only the standard library, so that the handlers are
installed before torch is imported.

SIGTERM, SIGUSR2 and SIGINT set a flag, and the training loop stops between two steps. While the main thread waits inside a
collective, Python runs no signal handler. Therefore a thread reads the wakeup descriptor, which the C-level handler writes
without delay, and starts the timer that ends the process after the grace period.
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
    """A request to stop; repeated signals count once.

    Call `install` once in the main thread, before anything else. Ranks get the signal at different steps: the loop must
    agree on `requested` over all ranks before it stops.

    Args:
        grace_seconds: Time from the first signal until the process is killed.
        on_expire: Called by the timer's thread before that; it must not use the process group.
    """

    def __init__(self, grace_seconds: float = DEFAULT_GRACE_SECONDS, on_expire: Callable[[], None] | None = None) -> None:
        self.grace_seconds = grace_seconds
        self.on_expire = on_expire
        self.requested = False
        self._first: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}
        self._pipe: tuple[int, int] | None = None
        self._previous_fd = -1

    @property
    def reason(self) -> str:
        """The first signal's name; empty without a request."""
        return self._first.name if self._first is not None else ""

    def install(self) -> "StopRequest":
        """Installs the handlers; a second call does nothing.

        Raises:
            ValueError: called outside the main thread.
        """
        if self._pipe is not None:
            return self
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)  # required by set_wakeup_fd
        self._previous_fd = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        self._pipe = (read_end, write_end)
        for number in STOP_SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        threading.Thread(target=self._watch, args=(read_end,), name="stop-request", daemon=True).start()
        unblock_stop_signals()
        return self

    def uninstall(self) -> None:
        """Restores the earlier handlers and cancels the timer."""
        if self._pipe is None:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # returned by signal.signal
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._pipe[1])  # ends the thread: its read returns nothing
        self._pipe = None

    def __enter__(self) -> "StopRequest":
        return self.install()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.uninstall()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._first = self._first or signal.Signals(number)
        self.requested = True

    def _watch(self, read_end: int) -> None:
        timer: threading.Timer | None = None
        while received := os.read(read_end, 64):
            for number in received:
                if timer is None and number in STOP_SIGNALS:
                    self._note(number, None)
                    timer = threading.Timer(self.grace_seconds, self._expire)
                    timer.daemon = True  # must not keep the process alive after a normal end
                    timer.start()
        if timer is not None:
            timer.cancel()
        os.close(read_end)

    def _expire(self) -> None:
        try:
            sys.stderr.write(
                f"{self.reason} came {self.grace_seconds:g} s ago and the run has not stopped; killing it, threads at:\n"
            )
            faulthandler.dump_traceback(all_threads=True)  # shows where the run hangs
            if self.on_expire is not None:
                self.on_expire()
        finally:
            os._exit(EXIT_FAILED)  # sys.exit would not work: the main thread may hang in a collective


def unblock_stop_signals() -> None:
    """Delivers pending signals; call it after the handlers are installed. A launcher may start a process with blocked stop
    signals, so that an early signal is neither lost nor kills it."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def _load_prctl() -> Callable[[int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)
    return prctl


def child_of(parent_pid: int, *, ignore_stop: bool) -> Callable[[], None]:
    """Returns a function that a child process calls first, as `preexec_fn` or at the start of a worker: the kernel then
    kills the child when the thread that started it ends. So start children from the main thread.

    Args:
        parent_pid: Process id of the parent; a child that finds another parent is already orphaned, and exits.
        ignore_stop: Whether the child ignores stop signals (workers of a rank do; ranks do not).
    """
    prctl = _load_prctl()  # in the parent: between fork and exec only system calls are safe

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # cleared by fork, so each child sets it itself
        if os.getppid() != parent_pid:  # the parent died between fork and prctl
            os._exit(EXIT_FAILED)
        if ignore_stop:
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_IGN)  # a Ctrl-C goes to the whole process group

    return prepare
