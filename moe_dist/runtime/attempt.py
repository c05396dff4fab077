"""Runs one attempt (one start of a run) on one rank. Every attempt ends with a verdict: an exit code in status.json.

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

CAUSE_SECONDS = 1.5  # seconds for which a rank waits until the rank that failed first has recorded the reason
STORAGE_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.ENOTCONN)
)
# Phrases in errors of gloo, NCCL and torch's store about a peer that ended or does not answer. Such errors name no cause.
_PEER = re.compile(r"connection (closed|reset|refused)|broken pipe|timed ?out|timeout|remote process exited", re.I)


def verdict_of(error: BaseException) -> tuple[int, str]:
    """Returns the exit code and the reason for a run that this exception ends."""
    if isinstance(error, MoeDistError):
        return error.exit_code, str(error)  # without traceback, because the user can fix such errors
    if isinstance(error, OSError) and error.errno in STORAGE_ERRORS:
        where = f"{error.filename}: " if error.filename else ""
        return EXIT_FAILED, (
            f"{where}{os.strerror(error.errno)}; repair this (free space, permissions, file system of the run folder), as "
            "docs/reliability.md tells"
        )
    return EXIT_FAILED, f"{type(error).__name__}: {error}"


def is_lost_peer(error: BaseException) -> bool:
    """Returns whether an exception says only that another rank has ended or does not answer."""
    return isinstance(error, RuntimeError | ConnectionError) and _PEER.search(str(error)) is not None


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # standard error may be closed or full
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class Attempt:
    """A context manager that records the end of its block as the attempt's verdict (exit code and reason).

    If the block raises an exception, the exception is printed (a `MoeDistError` as its message, any other with a
    traceback). The process then ends with `os._exit` inside `__exit__`, because any further collective could wait for ranks
    that have ended. The other ranks notice that the process's connections are closed.

    Attributes:
        exit_code: The exit code of the verdict, set when the block has ended.
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
        """Sets the function that returns the run's current step. Call this method when the step is known."""
        self._step = step

    def require(self, commit_check: Callable[[], None]) -> None:
        """Sets the function that `check_commit` calls. The function must raise an error if records are not on disk yet."""
        self._commit_check = commit_check

    def last_step(self) -> int:
        """Returns the current step. Before `follow` is called, returns the last step that the run folder records."""
        assert self._folder is not None, "the run folder is open"
        return self._step() if self._step is not None else self._folder.last_step()

    def open(
        self, config: Config, *, wait_seconds: float = WAIT_SECONDS, stopped: Callable[[], bool] | None = None
    ) -> RunFolder:
        """Returns the run folder. Rank 0 also opens it for writing. Call this method before the process group is created,
        so that no rank passes the rendezvous before rank 0 has the lease.

        Args:
            wait_seconds: Longest wait of rank 0 for the end of another attempt. A message on standard error announces it.
            stopped: Function that returns True after a stop signal, which ends the wait.

        Raises:
            ConfigError, DataError, LeaseError, RunFolderError, StoppedError: raised by `RunFolder.open`.
        """
        folder = RunFolder.of(config)
        if self._env.rank == 0:
            self._lease = folder.open(config, self._env, wait_seconds=wait_seconds, on_wait=_say, stopped=stopped)
        self._folder = folder  # set after opening, so that a refused start records no verdict
        return folder

    @property
    def attempt_id(self) -> str:
        """Returns the attempt's name, which is equal on all ranks after `join`."""
        return self._env.attempt_id

    def join(self, attempt_id: str) -> RankEnv:
        """Sets the attempt's name to rank 0's name, because status.json accepts a verdict only under that name. Returns
        this rank's environment with the new name."""
        self._env = replace(self._env, attempt_id=attempt_id)
        return self._env

    @property
    def lease(self) -> Lease:
        """Returns the lease of the run. Only rank 0 has it, from the call of `open` on."""
        assert self._lease is not None, "this is rank 0, and the run folder is open"
        return self._lease

    def check_commit(self) -> None:
        """Checks that a checkpoint may be committed. On rank 0, `CheckpointManager` calls this method before it writes
        anything and before each rename.

        Raises:
            LeaseError: another attempt has taken over the run.
            CheckpointError: raised by the function that `require` set.
        """
        if self._lease is not None:
            # checked first, because a run that has lost its lease must end with LeaseError, not as a failed save
            self._lease.check()
        self._commit_check()

    def finish(self) -> None:
        """Records that the run is done. Call this method on every rank after the last save, before the sinks close. A later
        error is printed, but changes neither the record nor the exit code."""
        if self._env.rank == 0:
            self._record(EXIT_DONE, "done", self._env.rank)
        self._finished = True
        self._tell()

    def expire(self) -> None:
        """Records the verdict of a run that did not stop within the grace period. `StopRequest`'s timer calls this
        method."""
        self._leave(EXIT_FAILED, "did not stop within the grace period after a stop signal", self._env.rank)

    def give_up(self, reason: str, at_fault: int | None) -> NoReturn:
        """Records the verdict of a run whose main thread hangs, and ends the process. The watchdog's thread calls this
        method. `at_fault` is the rank for which the other ranks wait; None if it is unknown."""
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
                # released after the verdict is recorded, because only the lease's holder may record it
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
            if not self._env.launched:  # moe_dist's launchers compare how all ranks ended, and replace this reason
                reason += (
                    "; a peer left without recording a reason, and srun, mpirun or torchrun do not tell moe_dist which one "
                    "and why: see their output for its exit code or signal, and the last lines of all ranks' logs"
                )
                _say(reason)
        self._tell()
        if not self._finished:
            self.exit_code = code
            with contextlib.suppress(OSError, MoeDistError):  # if the disk is full, the exit code alone reports the error
                self._wait_for_cause(error)
                self._record(code, reason, at_fault)

    @staticmethod
    def _end(code: int) -> NoReturn:
        logging.shutdown()  # flushes the log, because os._exit runs no atexit handler
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # runs no atexit handler, because it could wait for other ranks or for threads in a collective

    def _wait_for_cause(self, error: BaseException) -> None:
        """If this rank failed only because another rank failed, waits until that rank has recorded its verdict. Both may
        learn of the error at the same moment, and only the first record counts."""
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
        if self._folder is not None and self._env.launched:  # only moe_dist's launchers read this file
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
