"""Handles stop signals, and makes child processes end with their parent. Imports only the standard library, so that
handlers can be installed before torch is imported.

SIGTERM, SIGUSR2 and SIGINT set a flag, and the training loop stops between two steps. While the main thread waits in a
collective, Python runs no signal handlers. But the C-level handler writes to the wakeup descriptor at once. A thread reads
this descriptor and starts a timer, which ends the process after the grace period.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Self

from moe_dist.errors import EXIT_FAILED

STOP_SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
DEFAULT_GRACE_SECONDS = 300.0
_PR_SET_PDEATHSIG = 1


class StopSignals:
    """Records the stop signals that this process receives inside a `with` block of its main thread.

    Args:
        on_first: Function that is called at the first signal, in the main thread.

    Attributes:
        first: The first stop signal; None if none has come yet.
        interrupts: Number of SIGINTs so far.
    """

    def __init__(self, on_first: Callable[[], None] = lambda: None) -> None:
        self.first: signal.Signals | None = None
        self._on_first = on_first
        self.interrupts = 0
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self.renew()
        # A launcher may start this process with stop signals blocked, so that an early signal is neither lost nor fatal.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # now pending signals arrive
        return self

    def renew(self) -> None:
        """Installs the handlers, also after a library has replaced them (as Ray does when it connects to a cluster)."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._note)

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]  # returned by signal.getsignal

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.first is None:
            self.first = signal.Signals(number)
            self._on_first()
        self.interrupts += number == signal.SIGINT


class StopRequest(StopSignals):
    """Records whether a signal has asked this rank to stop. Repeated signals count once. Enter this context manager first,
    in the main thread.

    Ranks get the signal at different steps. Before it stops, the training loop must therefore agree on `requested` over all
    ranks.

    Args:
        grace_seconds: Seconds from the first signal until the process is killed.
        on_expire: Function that the timer's thread calls before it kills the process. The function must not use the process
            group.
        told: If True, the first signal is announced on standard error at once, because the current step can take long.
    """

    def __init__(
        self,
        grace_seconds: float = DEFAULT_GRACE_SECONDS,
        on_expire: Callable[[], None] | None = None,
        *,
        told: bool = False,
    ) -> None:
        super().__init__()
        self.grace_seconds, self.on_expire, self._told = grace_seconds, on_expire, told

    @property
    def requested(self) -> bool:
        return self.first is not None

    def __enter__(self) -> Self:
        read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)  # required by set_wakeup_fd
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_end,), name="stop-request", daemon=True).start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        signal.set_wakeup_fd(self._previous_fd)
        os.close(self._write_end)  # the thread's read then returns nothing, which ends the thread and cancels its timer

    def _watch(self, read_end: int) -> None:
        timer: threading.Timer | None = None
        while received := os.read(read_end, 64):
            for number in received:
                if timer is None and number in STOP_SIGNALS:
                    self.first = self.first or signal.Signals(number)
                    timer = threading.Timer(self.grace_seconds, self._expire)
                    timer.daemon = True  # a daemon, so that the timer does not keep the process alive after a normal end
                    timer.start()
                    if self._told:
                        name = signal.Signals(number).name
                        with contextlib.suppress(OSError, ValueError):  # standard error may be closed or full
                            sys.stderr.write(f"{name}: the run finishes its current step or evaluation, saves, and stops\n")
                            sys.stderr.flush()
        if timer is not None:
            timer.cancel()
        os.close(read_end)

    def _expire(self) -> None:
        name = self.first.name if self.first is not None else ""
        try:
            sys.stderr.write(
                f"{name} came {self.grace_seconds:g} s ago and the run has not stopped; killing it, threads at:\n"
            )
            faulthandler.dump_traceback(all_threads=True)  # shows where the run hangs
            if self.on_expire is not None:
                self.on_expire()
        finally:
            os._exit(EXIT_FAILED)  # sys.exit would not end a main thread that hangs in a collective


def child_of(parent_pid: int, *, ignore_stop: bool) -> Callable[[], None]:
    """Returns a function that a child process must call first, as `preexec_fn` or at the start of a worker. The kernel then
    kills the child when the thread that started it ends. So start children in the main thread.

    Args:
        parent_pid: Process id of the parent. A child with any other parent is already orphaned, and exits.
        ignore_stop: If True, the child ignores stop signals. Set for workers of a rank, but not for ranks.
    """
    prctl = None
    if sys.platform.startswith("linux"):  # loaded here in the parent, as only system calls are safe between fork and exec
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        prctl.argtypes = (ctypes.c_int, ctypes.c_ulong)

    def prepare() -> None:
        if prctl is not None:
            prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # set in each child, because fork clears this setting
        if os.getppid() != parent_pid:  # the parent died between fork and prctl
            os._exit(EXIT_FAILED)
        if ignore_stop:
            for number in STOP_SIGNALS:
                # because a Ctrl-C in the terminal goes to the whole process group
                signal.signal(number, signal.SIG_IGN)

    return prepare
