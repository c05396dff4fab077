"""Runs one attempt (one start of a run) on one rank. Every attempt ends with a verdict, an exit code in status.json.

with Attempt(env) as attempt:
    attempt.open(config)                      # rank 0: lease, configuration, status
    attempt.follow(lambda: progress.step)
    ...
sys.exit(attempt.exit_code)
"""

import contextlib
import errno
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from moe_dist.config.schema import Config
from moe_dist.errors import EXIT_DONE, EXIT_FAILED, LONGEST, MoeDistError, printable
from moe_dist.runtime.environment import RankEnv
from moe_dist.runtime.lease import WAIT_SECONDS, Lease
from moe_dist.runtime.run_folder import RunFolder
from moe_dist.runtime.secrets import without_secrets

CAUSE_SECONDS = 1.5  # seconds that a rank waits until another rank, which failed first, records the reason
STORAGE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)
)
# Words in errors of gloo, NCCL and torch's store about a peer that ended or does not answer. Such errors name no cause.
_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|timed ?out|timeout|remote process exited", re.I)


def verdict_of(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the reason of a run that ends with this exception."""
    if isinstance(error, MoeDistError):
        return error.exit_code, str(error)  # a user can fix such an error without a traceback
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return EXIT_FAILED, (
            f"{where}{os.strerror(error.errno)}; repair this (free space, permissions, file system of the run folder) and "
            "start again: the run resumes from its last checkpoint (docs/reliability.md)"
        )
    return EXIT_FAILED, f"{type(error).__name__}: {error}"


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an exception only says that another rank has ended or does not answer."""
    return isinstance(error, RuntimeError | ConnectionError) and _PEER.search(str(error)) is not None


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed or full
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class Attempt:
    """A context manager that records how its body ends, as the attempt's verdict (exit code and reason).

    An exception of the body is printed (a `MoeDistError` as its message, any other with a traceback), and the process ends
    with `os._exit` inside `__exit__`, because a further collective could wait for ranks that are gone. Other ranks notice
    the closed connections of the ended process.

    Attributes:
        exit_code: The verdict, after the block.
    """

    def __init__(self, env: RankEnv) -> None:
        self._env = env
        self._folder: RunFolder | None = None
        self._lease: Lease | None = None
        self._step: Callable[[], int] | None = None
        self._commit_check: Callable[[], None] = lambda: None
        self._finished = False
        self.exit_code = EXIT_DONE

    def follow(self, step: Callable[[], int]) -> None:
        """Sets the function that returns the run's current step; call `follow` once the step is known."""
        self._step = step

    def require(self, commit_check: Callable[[], None]) -> None:
        """Sets the function that `check_commit` calls; the function must raise if records are not on disk yet."""
        self._commit_check = commit_check

    def last_step(self) -> int:
        """Returns the current step; before a call of `follow`, the last step that the open run folder records."""
        assert self._folder is not None, "the run folder is open"
        return self._step() if self._step is not None else self._folder.last_step()

    def open(
        self, config: Config, *, wait_seconds: float = WAIT_SECONDS, stopped: Callable[[], bool] | None = None
    ) -> RunFolder:
        """Returns the run folder, which rank 0 opens for writing. Call `open` before the process group is created, so that
        no rank passes the rendezvous before rank 0 holds the lease.

        Args:
            wait_seconds: How long rank 0 waits for another attempt to end; a message on standard error announces the wait.
            stopped: Returns True after a stop signal, which ends the wait.

        Raises:
            ConfigError, DataError, LeaseError, RunFolderError, StoppedError: `RunFolder.open` raised the error.
        """
        folder = RunFolder.of(config)
        if self._env.rank == 0:
            self._lease = folder.open(config, self._env, wait_seconds=wait_seconds, on_wait=_say, stopped=stopped)
        self._folder = folder  # set after the open, so that a refused start records no verdict
        return folder

    @property
    def attempt_id(self) -> str:
        """Name of the attempt, which is equal on all ranks after `join`."""
        return self._env.attempt_id

    def join(self, attempt_id: str) -> RankEnv:
        """Sets the attempt's name to rank 0's, because status.json accepts a verdict only under rank 0's name. Returns this
        rank's environment with the attempt's name."""
        self._env = replace(self._env, attempt_id=attempt_id)
        return self._env

    @property
    def lease(self) -> Lease:
        """The lease of the run, which only rank 0 holds, from `open` on."""
        assert self._lease is not None, "this is rank 0, and the run folder is open"
        return self._lease

    def check_commit(self) -> None:
        """Checks that a checkpoint may be committed. `CheckpointManager` calls this method on rank 0, before anything is
        written and before each rename.

        Raises:
            LeaseError: another attempt has taken over the run.
            CheckpointError: from the function that `require` set.
        """
        if self._lease is not None:
            # checked first, because a run that lost its lease must end with LeaseError, not with a failed save
            self._lease.check()
        self._commit_check()

    def finish(self) -> None:
        """Records that the run is done; call `finish` on every rank after the last save, before the sinks close. An error
        after `finish` is printed, but changes neither the record nor the exit code."""
        if self._env.rank == 0:
            self._record(EXIT_DONE, "done", self._env.rank)
        self._finished = True
        self._tell()

    def expire(self) -> None:
        """Records the verdict of a run that did not stop within the grace period; the timer of `StopRequest` calls this
        method."""
        reason = "did not stop within the grace period after a stop signal; the last checkpoint is intact"
        self._leave(EXIT_FAILED, reason, self._env.rank)

    def give_up(self, reason: str, at_fault: int | None) -> NoReturn:
        """Records the verdict of a run whose main thread hangs, and ends the process. The watchdog's thread calls this
        method. `at_fault` is the rank for which the others wait; None if unknown."""
        with contextlib.suppress(Exception):  # the process must end even if the record cannot be written
            self._leave(EXIT_FAILED, reason, at_fault)
        _say(reason)
        self._end(EXIT_FAILED)

    def __enter__(self) -> "Attempt":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error is None and not self._finished:
            if self._env.rank == 0:
                self._leave(EXIT_DONE, "done", self._env.rank)
            return
        if error is not None:
            self._report(error)
        with contextlib.suppress(OSError):
            if self._lease is not None:
                # released after the verdict is recorded, because only the holder of the lease may record it
                self._lease.release()
        # ends the process even after success, because an exit handler could wait for an unclosed sink
        self._end(self.exit_code)

    def _report(self, error: BaseException) -> None:
        code, reason = verdict_of(error)
        reason = printable(without_secrets(reason, os.environ))  # an exception may quote an access key
        trace_text = without_secrets("".join(traceback.format_exception(error)), os.environ).rstrip("\n")
        trace_text = printable(trace_text, most=50 * LONGEST)
        _say(reason if isinstance(error, MoeDistError) else trace_text)
        consequence = isinstance(error, MoeDistError) and error.consequence
        at_fault = None if is_lost_peer(error) or consequence else self._env.rank
        if is_lost_peer(error):
            reason = f"rank {self._env.rank} on {socket.gethostname()} lost a peer: {reason}"
            if not self._env.launched:  # moe_dist's launchers compare the ends of all ranks, and replace this reason
                reason += (
                    "; a peer left without recording a reason, and srun, mpirun or torchrun do not tell moe_dist which one "
                    "and why: see their output for its exit code or signal, and the last lines of all ranks' logs"
                )
                _say(reason)
        self._tell()
        if not self._finished:
            self.exit_code = code
            with contextlib.suppress(OSError, MoeDistError):  # if the disk is full, only the exit code reports the error
                self._wait_for_cause(error)
                self._record(code, reason, at_fault)

    @staticmethod
    def _end(code: int) -> NoReturn:
        logging.shutdown()  # flushes the log, because os._exit runs no atexit handler
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # runs no atexit handler, because a handler may wait for other ranks or for threads in a collective

    def _wait_for_cause(self, error: BaseException) -> None:
        """If this rank failed only because another rank failed, waits until that rank has recorded the verdict, because the
        first record counts and both ranks may learn of the error at the same moment."""
        if self._folder is None or not (isinstance(error, MoeDistError) and error.consequence):
            return
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline and not self._folder.has_verdict(self._env.attempt_id):  # polls one file
            time.sleep(0.02)

    def _leave(self, verdict: int, reason: str, at_fault: int | None) -> None:
        self._tell()
        self._record(verdict, reason, at_fault)
        if self._lease is not None:
            self._lease.release()

    def _tell(self) -> None:
        if self._folder is not None and self._env.launched:  # read by moe_dist's launchers only
            self._folder.tell(self._env.attempt_id, self._env.rank)

    def _record(self, verdict: int, reason: str, at_fault: int | None) -> None:
        if self._folder is not None:
            host = socket.gethostname() if at_fault == self._env.rank else ""
            self._folder.write_status(
                verdict=verdict,
                reason=reason,
                last_step=self.last_step(),
                attempt_id=self._env.attempt_id,
                rank=at_fault,
                rank_host=host,
            )
