"""Calls a function in a child process. The child ends itself if a call takes too much time or memory."""

import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

WAITS = 6  # wall-clock limit / CPU-time limit of a call, as a call may wait for disks and processors


class TimedCalls:
    """Calls a function in a child process, which is forked at the first call.

    The child sets timers before each call. They end the child even inside C code, and even if the parent has ended.

    Args:
        function: Function whose arguments and result can be pickled.
        seconds: CPU seconds that a call may take in all threads. The limit of wall-clock time is WAITS times as long.
        memory: Number of bytes that the child may allocate in addition to this process's memory. A call that needs more
            raises MemoryError. If C code cannot allocate and raises no error, the child ends instead.
    """

    def __init__(self, function: Callable[..., Any], seconds: int, memory: int = 2 << 30) -> None:
        self._function, self._seconds, self._memory = function, seconds, memory
        self._child: Any = None

    def __call__(self, *arguments: Any) -> Any:
        """Returns the function's result, or raises its exception. Pickling must work for arguments, result and exception.

        Raises:
            TimeoutError: the call exceeded a time limit.
            ChildProcessError: the child ended for another reason, such as a lack of memory.
        """
        self.send(*arguments)
        return self.receive()

    def send(self, *arguments: Any) -> None:
        """Starts a call. The caller must call `receive` before the next call."""
        if self._child is None:
            fork = multiprocessing.get_context("fork")
            self._calls, other = fork.Pipe()
            self._child = fork.Process(target=self._serve, args=(other, self._calls), daemon=True)
            self._child.start()
            other.close()
        with suppress(OSError):  # `receive` reports the error if the child has ended
            self._calls.send(arguments)

    def receive(self) -> Any:
        """Waits for the started call. Returns and raises as `__call__` does."""
        try:
            returned, value = self._calls.recv()
        except (EOFError, OSError) as error:
            self._child.join()
            ended, self._child = self._child.exitcode, None
            if ended == -signal.SIGALRM:
                raise TimeoutError(f"took more than {self._seconds * WAITS} s") from error
            if ended == -signal.SIGPROF:
                raise TimeoutError(f"took more than {self._seconds} s of CPU time") from error
            raise ChildProcessError(f"ended its process with exit code {ended}") from error
        if returned:
            return value
        raise value

    def _serve(self, calls: Connection, others: Connection) -> None:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # native code prints its own reports, such as Rust's backtrace
        others.close()  # if this copy stayed open, `recv` would not notice that the parent has ended
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the parent, which closes the parent's end of the pipe
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.signal(signal.SIGPROF, signal.SIG_DFL)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + self._memory
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))
        while True:
            try:
                arguments = calls.recv()
            except (EOFError, ConnectionResetError):  # a reset, if answers were left unread
                return
            signal.setitimer(signal.ITIMER_PROF, self._seconds)
            signal.alarm(self._seconds * WAITS)
            try:
                answer = True, self._function(*arguments)
            except Exception as error:  # raised again in the parent
                answer = False, error
            signal.alarm(0)
            signal.setitimer(signal.ITIMER_PROF, 0)
            calls.send(answer)
